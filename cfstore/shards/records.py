"""What a shard says about itself in its own metadata, enough to rebuild the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from types import UnionType
from typing import Any, Final, Literal, TypeVar, get_args, get_type_hints

from cfstore.codecs import CODECS
from cfstore.convert import DTYPES
from cfstore.errors import StoreFormatError
from cfstore.schema import FORMAT_VERSION, check_name, check_version
from cfstore.types import SCALES

Format = Literal["zarr", "webdataset"]


@dataclass(frozen=True)
class BagRecord:
    """One bag: its rows in the shard and where they came from. Fields as in `schema.BAGS`.

    `row_start` is None in a tar, which has no common rows.
    """

    scale: int
    row_start: int | None
    n_patches: int
    digest: str
    has_coords: bool
    source: str
    source_bytes: int
    source_mtime_ns: int
    source_dtype: str
    max_abs_error: float
    rms_relative_error: float
    mpp: float | None = None
    level0_magnification: float | None = None
    patch_size: int | None = None
    patch_size_level0: int | None = None


@dataclass(frozen=True)
class SlideRecord:
    """One slide of a shard.

    Parameters
    ----------
    cohort
        What the user named at ingest; None if nothing was named.
    folder
        Name of the ingested folder, the cohort of last resort.
    position
        The slide's number in the shard: its row in `scale` and `zero` of int8.
    digests
        By array (or tar member): xxh3-64 of the stored bytes of each of its chunks.
    """

    slide_id: str
    cohort: str | None
    folder: str
    position: int
    bags: tuple[BagRecord, ...]
    digests: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class ShardRecord:
    """One shard: everything but the rows. `shard` is its path relative to the store.

    `replaces` names older shards that this one, made by `compact`, stands for: they no longer count.
    `chunk_rows` and `n_rows` describe the arrays of a Zarr shard; 0 in a tar.
    """

    shard: str
    format: Format
    encoder: str
    dim: int
    dtype: str
    codec: str
    created: str
    replaces: tuple[str, ...] = ()
    chunk_rows: int = 0
    n_rows: int = 0
    slides: tuple[SlideRecord, ...] = ()

    def to_attributes(self) -> dict[str, Any]:
        """As JSON-ready attributes; the shard's own place is where it lies, so it is not among them."""
        content = asdict(self)
        del content["shard"]
        return {"format_version": FORMAT_VERSION, **content}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], shard: str) -> ShardRecord:
        """Read attributes back; raises StoreFormatError naming the shard."""
        try:
            content = dict(attributes)
            check_version(shard, content.pop("format_version"))
            slides = tuple(slide_from_json(slide) for slide in content.pop("slides"))
            replaces = tuple(content.pop("replaces"))
            record = _typed(cls(**{**content, "shard": shard, "slides": slides, "replaces": replaces}))
            if record.dtype not in DTYPES or record.codec not in CODECS or not 1 <= record.dim < _MAX_DIM:
                raise ValueError(f"dtype {record.dtype!r}, codec {record.codec!r}, dim {record.dim}")
            check_name("encoder", record.encoder, "--encoder")
            return record
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            message = f"{shard}: not a cfstore shard ({error!r})"
            raise StoreFormatError(message) from error


def slide_from_json(content: Mapping[str, Any]) -> SlideRecord:
    """A SlideRecord from its JSON; KeyError, TypeError or ValueError where it is not one."""
    if "/" in content["slide_id"] or not content["slide_id"]:
        message = f"slide_id {content['slide_id']!r}"
        raise ValueError(message)
    bags = tuple(_typed(BagRecord(**bag)) for bag in content["bags"])
    if not bags or any(bag.scale not in SCALES or not 1 <= bag.n_patches < _MAX_PATCHES for bag in bags):
        message = f"bags {[(bag.scale, bag.n_patches) for bag in bags]}"
        raise ValueError(message)
    digests = {name: tuple(values) for name, values in content["digests"].items()}
    return _typed(SlideRecord(**{**content, "bags": bags, "digests": digests}))


_R = TypeVar("_R")
_MAX_PATCHES: Final = 1 << 36
_MAX_DIM: Final = 1 << 20
_INT32: Final = ("dim", "chunk_rows", "patch_size", "patch_size_level0")  # as in schema.BAGS
_KINDS: Final[Mapping[Any, Any]] = {str: str, int: int, float: (int, float), bool: bool, type(None): type(None)}


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _typed(record: _R) -> _R:
    """`record`, if every field holds what it is declared to hold; TypeError otherwise: JSON may say anything."""
    kind: Any = type(record)
    for name, hint in _hints(kind).items():
        value = getattr(record, name)
        allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds = [_KINDS[kind] for kind in allowed if kind in _KINDS]
        fits = any(isinstance(value, kind) for kind in kinds) and (bool in kinds or not isinstance(value, bool))
        if type(value) is int:
            bits = 31 if name in _INT32 else 63 if name == "source_mtime_ns" else 48
            fits = fits and abs(value) < 1 << bits
        if kinds and not fits:
            message = f"{name} is {repr(value)[:50]}"
            raise TypeError(message)
    return record


@dataclass(frozen=True)
class Extent:
    """Where one array of a bag (or of a slide: `scale`, `zero`) lies in its file.

    `sizes` are the stored bytes of its chunks, which follow each other from `byte_start`; one
    size in a tar, where the rows are no chunks. `decoded_start` is the first decoded byte of the
    bag within the first of these chunks; `digests` are the chunks' xxh3-64, where they are known.
    """

    slide_id: str
    scale: int | None
    array: str
    byte_start: int
    sizes: tuple[int, ...]
    decoded_start: int = 0
    digests: tuple[int, ...] = ()
