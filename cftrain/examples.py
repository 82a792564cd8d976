"""What one training example is: a slide, or all slides of a patient as one bag. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cfstore import CohortSlide

Unit = Literal["slide", "patient"]


@dataclass(frozen=True)
class Example:
    """One bag with its label.

    Parameters
    ----------
    name
        The slide's id; the patient's where the bag holds several slides.
    slide_ids
        Whose patches it holds, in this order.
    n_patches
        Patches by scale, of all its slides.
    """

    name: str
    patient_id: str
    slide_ids: tuple[str, ...]
    time_months: float
    event: bool
    n_patches: Mapping[int, int]

    @property
    def total_patches(self) -> int:
        """Patches of all scales."""
        return sum(self.n_patches.values())


def make_examples(slides: Sequence[CohortSlide], unit: Unit) -> tuple[Example, ...]:
    """The examples of a cohort, in the order in which slides or patients first appear."""
    bags: dict[str, list[CohortSlide]] = {}
    for slide in slides:
        bags.setdefault(slide.slide_id if unit == "slide" else slide.patient_id, []).append(slide)
    return tuple(_example(name if len(held) > 1 else held[0].slide_id, held) for name, held in bags.items())


def _example(name: str, slides: Sequence[CohortSlide]) -> Example:
    first = slides[0]
    patches = {scale: sum(slide.n_patches[scale] for slide in slides) for scale in first.n_patches}
    slide_ids = tuple(slide.slide_id for slide in slides)
    return Example(name, first.patient_id, slide_ids, first.time_months, first.event, patches)
