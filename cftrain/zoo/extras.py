"""What a model reads of a slide besides features. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["coords", "nearest", "similar", "parents", "mean", "prototypes"]


@dataclass(frozen=True, order=True)
class Extra:
    """One thing that a model reads of a slide besides features; made by the functions below."""

    kind: Kind
    scale: int
    """Whose patches have a row each."""
    coarse: int = 0
    """Of parents: the scale whose rows they are."""
    k: int = 0
    """Of nearest and similar: neighbours of a patch; of prototypes: how many."""

    @property
    def label(self) -> str:
        """What to call it in a line of text."""
        if self.kind == "coords":
            return f"coordinates at {self.scale}x"
        if self.kind == "prototypes":
            return f"{self.k} k-means prototypes of the training fold at {self.scale}x"
        if self.kind == "mean":
            return f"mean patch at {self.scale}x"
        if self.kind == "parents":
            return f"{self.coarse}x parents of {self.scale}x patches"
        return f"{self.k} {self.kind} patches at {self.scale}x"

    @property
    def from_coordinates(self) -> tuple[int, ...]:
        """The scales whose coordinates it is made of."""
        if self.kind in ("similar", "mean", "prototypes"):
            return ()
        return (self.scale, self.coarse) if self.kind == "parents" else (self.scale,)

    @property
    def rows_of(self) -> int:
        """The scale whose rows its values are, -1 standing for none; 0 where its values are no rows."""
        return {"coords": 0, "mean": 0, "prototypes": 0, "parents": self.coarse}.get(self.kind, self.scale)


def coords(scale: int) -> Extra:
    """Top-left x, y of every patch in level-0 pixels: [N, 2]."""
    return Extra("coords", scale)


def nearest(scale: int, k: int = 8) -> Extra:
    """The k other patches nearest in space, by distance and then row: [N, k] rows, -1 where there are fewer."""
    return Extra("nearest", scale, k=k)


def similar(scale: int, k: int = 8) -> Extra:
    """The k other patches with the most similar features, by distance and then row: [N, k] rows, -1 as above."""
    return Extra("similar", scale, k=k)


def parents(fine: int, coarse: int) -> Extra:
    """The coarse patch that each fine one overlaps most: [N_fine] rows, -1 where it overlaps none."""
    return Extra("parents", fine, coarse)


def mean(scale: int) -> Extra:
    """The mean patch of a slide: [D]; only to be fitted on, no batch carries it."""
    return Extra("mean", scale)


def prototypes(scale: int, n: int) -> Extra:
    """Centres of n k-means clusters of a training fold's patches: [n, D]; only to be fitted on."""
    return Extra("prototypes", scale, k=n)
