"""Feature files as tools write them -> `RawBag`.

`discover` walks a folder and says which file is which bag (`BagSource`); `read_head` and
`read_bag` open one. A new file type is one module with `head` and `read`, and one line here.
"""

from __future__ import annotations

from cfstore.parsers import hdf5, torch_file
from cfstore.parsers.layout import Discovery, discover
from cfstore.parsers.sources import BagHead, BagSource, RawBag

__all__ = ["BagHead", "BagSource", "Discovery", "RawBag", "discover", "read_bag", "read_head"]

_READERS = {".h5": hdf5, ".pt": torch_file}


def read_head(source: BagSource) -> BagHead:
    """Shape and attributes of one bag, without its rows where the format allows; raises SourceError."""
    return _READERS[source.path.suffix.lower()].head(source.path)


def read_bag(source: BagSource) -> RawBag:
    """One whole bag; raises SourceError naming the file, what was found and what to do."""
    return _READERS[source.path.suffix.lower()].read(source.path)
