"""`BagBatch`: several slides, packed row-wise per scale. B slides, N_b patches of slide b, D features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from cftrain.errors import MissingExtraError, MissingScaleError, ShapeError
from cftrain.zoo import Extra


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
    extras: Mapping[Extra, Tensor] = field(default_factory=dict)
    """What models read besides features, [sum N_b, ...] in the same order. Values that name patches are rows of the
    packed batch, int64, -1 for none; those of a slide name patches of that slide."""

    def __post_init__(self) -> None:
        if self.features.keys() != self.lengths.keys():
            raise ShapeError(f"features at scales {sorted(self.features)}, lengths at {sorted(self.lengths)}")
        for scale, rows in self.features.items():
            self._check_scale(scale, rows, self.lengths[scale])
        for extra, rows in self.extras.items():
            self._check_extra(extra, rows)

    def _check_scale(self, scale: int, rows: Tensor, lengths: tuple[int, ...]) -> None:
        if len(lengths) != len(self.slide_ids):
            raise ShapeError(f"{len(lengths)} lengths at {scale}x for {len(self.slide_ids)} slides")
        for slide_id, length in zip(self.slide_ids, lengths, strict=True):
            if length < 1:
                raise MissingScaleError(f"{slide_id}: no patch at {scale}x; leave the slide out")
        if rows.ndim != 2 or rows.shape[0] != sum(lengths):
            raise ShapeError(f"features at {scale}x must be [{sum(lengths)}, D], got {list(rows.shape)}")

    def _check_extra(self, extra: Extra, rows: Tensor) -> None:
        _check_scales_of(extra, self.slide_ids[0], self.lengths)
        if len(rows) != sum(self.lengths[extra.scale]):
            message = f"{extra.label} must have {sum(self.lengths[extra.scale])} rows, got {list(rows.shape)}"
            raise ShapeError(f"{self.slide_ids[0]}: {message}")

    @classmethod
    def pack(
        cls,
        slide_ids: Sequence[str],
        bags: Sequence[Mapping[int, Tensor]],
        extras: Sequence[Mapping[Extra, Tensor]] = (),
    ) -> BagBatch:
        """Pack the bags of several slides.

        Parameters
        ----------
        slide_ids
            B names.
        bags
            B mappings from scale to [N_b, D] features; all slides have the same scales.
        extras
            B mappings to what else there is of each slide, rows counted within the slide; none: nothing.

        Raises
        ------
        MissingScaleError
            A slide lacks a scale that another has, or has no patch there.
        MissingExtraError
            A slide lacks an extra that another has.
        ShapeError
            No slides, unequal numbers of names and bags, or features that are not [N_b, D] of one D a scale.
        """
        if not slide_ids or len(slide_ids) != len(bags) or (extras and len(extras) != len(bags)):
            raise ShapeError(f"{len(slide_ids)} slides, {len(bags)} sets of bags; give one of each, at least once")
        scales = sorted(set().union(*bags))
        for slide_id, bag in zip(slide_ids, bags, strict=True):
            _check_bags(slide_id, bag, scales, bags[0])
        lengths = {scale: tuple(len(bag[scale]) for bag in bags) for scale in scales}
        return cls(
            slide_ids=tuple(slide_ids),
            features={scale: _join([bag[scale] for bag in bags]) for scale in scales},
            lengths=lengths,
            extras=_pack_extras(slide_ids, extras, lengths),
        )

    def grouped(self, names: Sequence[str], counts: Sequence[int]) -> BagBatch:
        """The same patches as fewer, larger bags: the first `counts[0]` slides become `names[0]`, and so on."""
        if sum(counts) != len(self) or len(names) != len(counts):
            raise ShapeError(f"{len(self)} slides cannot become {len(names)} bags of {list(counts)} slides")
        ends = [0, *accumulate(counts)]
        lengths = {
            scale: tuple(sum(each[start:end]) for start, end in pairwise(ends)) for scale, each in self.lengths.items()
        }
        return replace(self, slide_ids=tuple(names), lengths=lengths)

    def keeping(self, scale: int, keep: Tensor) -> BagBatch:
        """Without some patches of one scale; what named them names none (-1).

        Parameters
        ----------
        keep
            bool [sum N_b]: which patches at `scale` stay.

        Raises
        ------
        MissingScaleError
            Nothing of a slide is left.
        """
        keep = keep.to(self.features[scale].device)
        lengths = tuple(int(own.sum()) for own in torch.split(keep, list(self.lengths[scale])))
        place = torch.where(keep, keep.cumsum(0) - 1, -1)
        place = torch.cat([place, place.new_tensor([-1])])  # row -1, none, stays none

        def extra_of(extra: Extra, rows: Tensor) -> Tensor:
            rows = rows[keep] if extra.scale == scale else rows
            return place[rows] if extra.rows_of == scale else rows

        return replace(
            self,
            features={**self.features, scale: self.features[scale][keep]},
            lengths={**self.lengths, scale: lengths},
            extras={extra: extra_of(extra, rows) for extra, rows in self.extras.items()},
        )

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> BagBatch:
        """Move everything to a device, or the features to another dtype; None leaves either as it is."""
        moved = {
            scale: rows.to(device=device, dtype=dtype, non_blocking=non_blocking)
            for scale, rows in self.features.items()
        }
        extras = {extra: rows.to(device=device, non_blocking=non_blocking) for extra, rows in self.extras.items()}
        return replace(self, features=moved, extras=extras)

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


def _pack_extras(
    slide_ids: Sequence[str], extras: Sequence[Mapping[Extra, Tensor]], lengths: Mapping[int, tuple[int, ...]]
) -> dict[Extra, Tensor]:
    found = {}
    for extra in sorted(set().union(*extras)):
        _check_scales_of(extra, slide_ids[0], lengths)
        for slide_id, own in zip(slide_ids, extras, strict=True):
            if extra not in own:
                raise MissingExtraError(f"{slide_id}: no {extra.label}, which other slides of the batch have")
        rows = [own[extra] for own in extras]
        if extra.rows_of:
            starts = [0, *accumulate(lengths[extra.rows_of])]
            rows = [_shifted(own, start) for own, start in zip(rows, starts, strict=False)]
        found[extra] = _join(rows)
    return found


def _check_scales_of(extra: Extra, slide_id: str, lengths: Mapping[int, tuple[int, ...]]) -> None:
    for scale in {extra.scale, extra.rows_of} - {0}:
        if scale not in lengths:
            raise ShapeError(f"{slide_id}: {extra.label}, but no features at {scale}x")


def _shifted(rows: Tensor, start: int) -> Tensor:
    rows = rows.long()
    return torch.where(rows < 0, rows, rows + start) if start else rows


def _join(bags: list[Tensor]) -> Tensor:
    return bags[0] if len(bags) == 1 else torch.cat(bags)
