"""`Ancestors`: which rows of a coarse scale stand for the patches around those of the finest.

A row of a pyramid is a patch of the finest scale with its ancestor at each coarser one. Coarse patches are embedded
first, and what was embedded is looked up: their features are never repeated for every child.

A patch without a parent (-1) finds a spare row, one for each slide, that stands behind the slide's own in every table.
What is in it is the model's rule for a missing parent.

Legend: B slides, N patches of the finest scale, M of the coarse one, W numbers a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from cftrain.models.bags import BagBatch
from cftrain.models.base import SurvivalModel
from cftrain.zoo.extras import parents


@dataclass(frozen=True)
class Ancestors:
    """The ancestors of a batch at one coarse scale."""

    at: Tensor
    """int64 [N]: the row of a table that stands for the ancestor of each patch."""
    lengths: tuple[int, ...]
    """The B coarse patch counts M_b; a table has one row more for each slide."""

    @classmethod
    def of(cls, model: SurvivalModel, batch: BagBatch, coarse: int) -> Ancestors:
        """Those of the patches of the model's finest scale.

        Raises
        ------
        MissingExtraError
            The batch does not have them; names its first slide.
        """
        finest = model.scales[-1]
        found, lengths = model.extra(batch, parents(finest, coarse)), batch.lengths[coarse]
        of_slides = torch.split(found, list(batch.lengths[finest]))
        ends = accumulate(lengths)
        # each slide before adds its spare row
        at = [torch.where(own < 0, end + b, own + b) for b, (own, end) in enumerate(zip(of_slides, ends, strict=True))]
        return cls(torch.cat(at), lengths)

    @property
    def table_lengths(self) -> tuple[int, ...]:
        """Rows of a table for each slide, the spare one last: M_b + 1."""
        return tuple(n + 1 for n in self.lengths)

    def table(self, rows: Tensor, spare: Tensor) -> Tensor:
        """Rows [M, W] of the coarse patches, each slide's spare row [B, W] behind its own: [M + B, W]."""
        bags = torch.split(rows, list(self.lengths))
        return torch.cat([part for bag in zip(bags, torch.split(spare, 1), strict=True) for part in bag])

    def look_up(self, table: Tensor) -> Tensor:
        """What stands for the ancestor of every patch: [M + B, W] to [N, W]."""
        return table.index_select(0, self.at)

    def gather(self, rows: Tensor) -> Tensor:
        """The sums over the patches of every ancestor: [N, W] to [M + B, W]."""
        n_rows = sum(self.lengths) + len(self.lengths)
        return rows.new_zeros(n_rows, rows.shape[1]).index_add(0, self.at, rows)
