"""Everything cfstore raises on purpose.

    StoreError
    ├── StoreNotFoundError        no store at this path
    ├── StoreFormatError          the directory is not a store this version reads
    │   └── DamagedShardError     bytes of a shard are not what was written
    ├── StoreBusyError            another process holds the write lock
    ├── StoreWriteError           the disk is full, read-only, or fails (also OSError)
    ├── SlideNotFoundError        no such slide, scale, encoder or cohort (also KeyError)
    ├── RemoteError               object storage: a request failed, finally
    │   ├── RemoteObjectMissingError  there is no such object
    │   ├── RemoteObjectChangedError  an object is not the one that was written
    │   └── PreconditionFailedError   an object is not what a conditional write expects
    ├── CacheError                a local cache that cannot be used, or is not written disk:FOLDER:SIZE
    ├── NotDerivedError           what was asked for has not been derived yet
    ├── DerivationError           no such derivation, or it cannot be made of these slides (also ValueError)
    ├── EngineError               Ray is missing, out of reach, or a node is not fit for the work
    ├── QueryError                SQL that is refused or fails (also ValueError)
    └── SourceError               an input file or folder is not usable (also ValueError)
        ├── LayoutError           the folder matches no known layout, or several
        ├── UnreadableFileError   truncated, not HDF5, or a pickle that is not plain tensors
        ├── MissingDatasetError   no `features` in the file
        ├── MissingScaleError     neither folder, file nor option says the scale
        ├── EmptyBagError         no patch in the bag
        ├── NonFiniteError        NaN or Inf among the features
        ├── ShapeError            features, coords or the encoder's dimension disagree
        ├── PrecisionError        values the chosen dtype cannot hold
        ├── DuplicateBagError     two files for one slide and scale, or a changed source
        ├── ClinicalError         a clinical table that cannot be understood
        └── SplitsError           fold files that cannot be used
            └── LeakageError      a patient on both sides of a fold

Messages name the file or the slide, what was found, and what to do, in one line.
"""

from __future__ import annotations

_addresses: dict[str, str] = {}


def show_as(folder: str, address: str) -> None:
    """Let messages of errors say `address` where they would say `folder`: of a store that was mirrored there."""
    _addresses[folder] = address


def shown(text: str) -> str:
    """`text` with the addresses of mirrored stores in place of the folders they are mirrored in."""
    for folder, address in _addresses.items():
        text = text.replace(folder, address)
    return text


class StoreError(Exception):
    """Base of every error that cfstore raises on purpose."""

    def __init__(self, *args: object) -> None:
        super().__init__(*(shown(each) if isinstance(each, str) else each for each in args))


class StoreNotFoundError(StoreError):
    """There is no store at the given path."""


class StoreFormatError(StoreError):
    """The directory is not a store, or one of a format this version does not read."""


class DamagedShardError(StoreFormatError):
    """Bytes of a shard are not what was written: changed, cut short, or missing."""


class StoreBusyError(StoreError):
    """Another process is registering in this store and did not finish in time."""


class StoreWriteError(StoreError, OSError):
    """The store cannot be written: the disk is full, read-only, or fails. What was committed stays."""


class SlideNotFoundError(StoreError, KeyError):
    """The store holds no such slide, scale, encoder or cohort."""

    def __str__(self) -> str:  # KeyError would print the message quoted
        return str(self.args[0]) if self.args else ""


class RemoteError(StoreError):
    """A request to object storage failed and would fail again, or failed too often."""


class RemoteObjectMissingError(RemoteError):
    """There is no such object."""


class RemoteObjectChangedError(RemoteError):
    """An object is shorter than it was written, or another one than a moment ago."""


class PreconditionFailedError(RemoteError):
    """An object is there already, or is another one than a conditional write was to replace; nothing was written."""


class CacheError(StoreError, ValueError):
    """A cache on a local disk cannot be used, or is not named as `disk:FOLDER:SIZE`."""


class NotDerivedError(StoreError):
    """`cfstore derive` has not computed that of the slide, or the slide's bags have changed since."""


class DerivationError(StoreError, ValueError):
    """There is no such derivation, or it cannot be made of these slides."""


class EngineError(StoreError):
    """What should do the work side by side cannot: Ray is missing or out of reach, or a node is not fit for it."""


class QueryError(StoreError, ValueError):
    """The SQL statement is refused (it writes, or reaches outside the store) or fails."""


class SourceError(StoreError, ValueError):
    """An input file or folder cannot be used as it is."""


class LayoutError(SourceError):
    """The folder matches no known layout, or more than one."""


class UnreadableFileError(SourceError):
    """The file is truncated, of another format, or would need unsafe unpickling."""


class MissingDatasetError(SourceError):
    """The file holds no `features`."""


class MissingScaleError(SourceError):
    """Neither folder, file nor option says at which scale the patches were cut."""


class EmptyBagError(SourceError):
    """The bag holds no patch."""


class NonFiniteError(SourceError):
    """The features hold NaN or Inf."""


class ShapeError(SourceError):
    """Shapes disagree: features against coords, or against the encoder's other slides."""


class PrecisionError(SourceError):
    """The chosen dtype cannot hold the values."""


class DuplicateBagError(SourceError):
    """Two files claim one slide and scale, or a source changed after it was ingested."""


class ClinicalError(SourceError):
    """The clinical table cannot be understood."""


class SplitsError(SourceError):
    """The fold files cannot be used."""


class LeakageError(SplitsError):
    """A patient is in both train and val of one fold."""
