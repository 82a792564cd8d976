"""What a shard says about itself in its group attributes, enough to rebuild the catalog."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cfstore.errors import StoreFormatError
from cfstore.schema import FORMAT_VERSION


@dataclass(frozen=True)
class BagRecord:
    """One bag: its rows in the shard and where they came from. Fields as in `schema.BAGS`."""

    scale: int
    row_start: int
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

    `cohort` is what the user named at ingest (None if nothing was named); `folder` is the name
    of the ingested folder, the cohort of last resort.
    """

    slide_id: str
    cohort: str | None
    folder: str
    bags: tuple[BagRecord, ...]


@dataclass(frozen=True)
class ShardRecord:
    """One shard: everything but the rows. `shard` is its path relative to the store."""

    shard: str
    encoder: str
    dim: int
    dtype: str
    created: str
    slides: tuple[SlideRecord, ...]

    def to_attributes(self) -> dict[str, Any]:
        """As JSON-ready group attributes."""
        return {"cfstore": {"format_version": FORMAT_VERSION, **asdict(self)}}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], shard: str) -> ShardRecord:
        """Read group attributes back; raises StoreFormatError naming the shard."""
        try:
            content = dict(attributes["cfstore"])
            version = content.pop("format_version")
            if version > FORMAT_VERSION:
                message = f"{shard}: shard format {version}, this version reads up to {FORMAT_VERSION}; upgrade"
                raise StoreFormatError(message)
            slides = tuple(
                SlideRecord(**{**slide, "bags": tuple(BagRecord(**bag) for bag in slide["bags"])})
                for slide in content.pop("slides")
            )
            return cls(**{**content, "shard": shard, "slides": slides})
        except (KeyError, TypeError) as error:
            message = f"{shard}: not a cfstore shard ({error!r})"
            raise StoreFormatError(message) from error
