"""Feature files as tools write them -> `RawBag`.

`discover` walks a folder and says which file is which bag (`BagSource`); `read_head` and
`read_bag` open one. A new file type is one module with `head` and `read`, and one line here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from cfstore.parsers import hdf5, torch_file
from cfstore.parsers.layout import Discovery, discover
from cfstore.parsers.sources import BagHead, BagSource, RawBag

__all__ = ["BagHead", "BagSource", "Discovery", "RawBag", "discover", "read_bag", "read_head"]

_HEADS: Mapping[str, Callable[[Path], BagHead]] = {".h5": hdf5.head, ".pt": torch_file.head}
_READS: Mapping[str, Callable[[Path], RawBag]] = {".h5": hdf5.read, ".pt": torch_file.read}


def read_head(source: BagSource) -> BagHead:
    """Shape and attributes of one bag, without its rows where the format allows; raises SourceError."""
    return _HEADS[source.path.suffix.lower()](source.path)


def read_bag(source: BagSource) -> RawBag:
    """One whole bag; raises SourceError naming the file, what was found and what to do."""
    return _READS[source.path.suffix.lower()](source.path)
