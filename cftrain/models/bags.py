"""`BagBatch`: several slides, packed row-wise per scale. B slides, N_b patches of slide b, D features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cftrain.errors import MissingScaleError, ShapeError


@dataclass(frozen=True, eq=False)
class BagBatch:
    """The bags of B slides, ready for a model. Nothing is padded, no slide sees another.

    Raises
    ------
    MissingScaleError
        A slide has no patch at one of the scales; names both.
    ShapeError
        Lengths, rows and slides disagree, or features are not [rows, D].
    """

    slide_ids: tuple[str, ...]
    """B names, in the order of every row of the output."""
    features: Mapping[int, Tensor]
    """Scale to [sum N_b, D]: the patches of all slides, slide after slide, in their stored order."""
    lengths: Mapping[int, tuple[int, ...]]
    """Scale to the B patch counts N_b."""

    def __post_init__(self) -> None:
        if self.features.keys() != self.lengths.keys():
            raise ShapeError(f"features at scales {sorted(self.features)}, lengths at {sorted(self.lengths)}")
        for scale, rows in self.features.items():
            self._check_scale(scale, rows, self.lengths[scale])

    def _check_scale(self, scale: int, rows: Tensor, lengths: tuple[int, ...]) -> None:
        if len(lengths) != len(self.slide_ids):
            raise ShapeError(f"{len(lengths)} lengths at {scale}x for {len(self.slide_ids)} slides")
        for slide_id, length in zip(self.slide_ids, lengths, strict=True):
            if length < 1:
                raise MissingScaleError(f"{slide_id}: no patch at {scale}x; leave the slide out")
        if rows.ndim != 2 or rows.shape[0] != sum(lengths):
            raise ShapeError(f"features at {scale}x must be [{sum(lengths)}, D], got {list(rows.shape)}")

    @classmethod
    def pack(cls, slide_ids: Sequence[str], bags: Sequence[Mapping[int, Tensor]]) -> BagBatch:
        """Pack the bags of several slides.

        Parameters
        ----------
        slide_ids
            B names.
        bags
            B mappings from scale to [N_b, D] features; all slides have the same scales.

        Raises
        ------
        MissingScaleError
            A slide lacks a scale that another has, or has no patch there.
        ShapeError
            No slides, unequal numbers of names and bags, or features that are not [N_b, D] of one D a scale.
        """
        if not slide_ids or len(slide_ids) != len(bags):
            raise ShapeError(f"{len(slide_ids)} slides, {len(bags)} sets of bags; give one of each, at least once")
        scales = sorted(set().union(*bags))
        for slide_id, bag in zip(slide_ids, bags, strict=True):
            _check_bags(slide_id, bag, scales, bags[0])
        return cls(
            slide_ids=tuple(slide_ids),
            features={scale: _join([bag[scale] for bag in bags]) for scale in scales},
            lengths={scale: tuple(len(bag[scale]) for bag in bags) for scale in scales},
        )

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BagBatch:
        """Move the features to a device, or to another dtype; None leaves either as it is."""
        moved = {
            scale: rows.to(device=device, dtype=dtype, non_blocking=non_blocking)
            for scale, rows in self.features.items()
        }
        return replace(self, features=moved)

    def __len__(self) -> int:
        """The number of slides, B."""
        return len(self.slide_ids)


def _check_bags(slide_id: str, bags: Mapping[int, Tensor], scales: list[int], first: Mapping[int, Tensor]) -> None:
    for scale in scales:
        if scale not in bags:
            raise MissingScaleError(f"{slide_id}: no features at {scale}x, which other slides of the batch have")
        rows = bags[scale]
        if rows.ndim != 2 or (scale in first and rows.shape[1:] != first[scale].shape[1:]):
            width = first[scale].shape[-1] if scale in first else "D"
            raise ShapeError(f"{slide_id}: features at {scale}x must be [N, {width}], got {list(rows.shape)}")


def _join(bags: list[Tensor]) -> Tensor:
    return bags[0] if len(bags) == 1 else torch.cat(bags)
