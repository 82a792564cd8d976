"""Feature files as tools write them -> `OpenBag`.

`discover` walks a folder and says which file is which bag (`BagSource`); `read_head` and
`open_bag` open one. A new file type is one module with `head` and `open_bag`, and two lines here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from cfstore.parsers import hdf5, torch_file
from cfstore.parsers.layout import Discovery, discover
from cfstore.parsers.sources import BagHead, BagSource, OpenBag, RawBag

__all__ = ["BagHead", "BagSource", "Discovery", "OpenBag", "RawBag", "discover", "open_bag", "read_bag", "read_head"]

_HEADS: Mapping[str, Callable[[Path], BagHead]] = {".h5": hdf5.head, ".pt": torch_file.head}
_OPENERS: Mapping[str, Callable[[Path], AbstractContextManager[OpenBag]]] = {
    ".h5": hdf5.open_bag,
    ".pt": torch_file.open_bag,
}


def read_head(source: BagSource) -> BagHead:
    """Shape and attributes of one bag, without its rows where the format allows; raises SourceError."""
    return _HEADS[source.path.suffix.lower()](source.path)


@contextmanager
def open_bag(source: BagSource) -> Iterator[OpenBag]:
    """One bag, to be read block by block; raises SourceError naming the file, what was found and what to do."""
    with _OPENERS[source.path.suffix.lower()](source.path) as bag:
        yield bag


def read_bag(source: BagSource) -> RawBag:
    """One whole bag; raises SourceError as `open_bag` does."""
    with open_bag(source) as bag:
        features = np.empty((bag.head.n_patches, bag.head.dim), bag.dtype)
        bag.fill(0, features)
        return RawBag(features, bag.coords())
