"""A slide as small JPEG files at halving sizes, for a viewer that reads them one by one from a folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from PIL import Image

LONGEST: Final = 8192
TILE: Final = 512
QUALITY: Final = 80


class Regions(Protocol):
    """What the viewer needs of a slide image."""

    @property
    def size(self) -> tuple[int, int]:
        """Width, height of level 0 in pixels."""

    @property
    def mpp(self) -> float | None:
        """Microns per level-0 pixel, or None."""

    def region(self, x: int, y: int, width: int, height: int, out_w: int, out_h: int, /) -> Image.Image:
        """The level-0 rectangle of that corner and size as an RGB image of out_w x out_h pixels."""


@dataclass(frozen=True)
class Pyramid:
    """What was written: `level/column_row.jpg`, level 0 is one tile, each next one twice as wide.

    Parameters
    ----------
    size
        Width, height of the last level in pixels.
    levels
        How many there are.
    tile
        A tile's side in pixels; those at the right and lower edge are smaller.
    """

    size: tuple[int, int]
    levels: int
    tile: int

    @classmethod
    def of(cls, size: tuple[int, int], longest: int = LONGEST, tile: int = TILE) -> Pyramid:
        """The pyramid of a slide of some size, its longer side at most `longest`, never larger than the slide."""
        shrink = max(1.0, max(size) / longest)
        width, height = (max(1, round(side / shrink)) for side in size)
        return cls((width, height), max(0, math.ceil(math.log2(max(width, height) / tile))) + 1, tile)

    def level_size(self, level: int) -> tuple[int, int]:
        """Width, height of a level in pixels."""
        halvings = 2 ** (self.levels - 1 - level)
        return math.ceil(self.size[0] / halvings), math.ceil(self.size[1] / halvings)

    def box(self, level: int, column: int, row: int) -> tuple[int, int, int, int]:
        """Left, top, right, lower edge of a tile in the pixels of its level."""
        width, height = self.level_size(level)
        left, top = column * self.tile, row * self.tile
        return left, top, min(left + self.tile, width), min(top + self.tile, height)


def write_pyramid(image: Regions, folder: Path, *, longest: int = LONGEST, tile: int = TILE) -> Pyramid:
    """Write the tiles of a slide.

    The slide is read once, at the last level; the others are halved from it, a tile's four children at a time, so
    that no more than a few tiles are in memory.

    Parameters
    ----------
    folder
        Is created; gets a folder per level.
    longest
        Limit of the longer side of the last level.

    Returns
    -------
    Pyramid
        What a viewer needs to find the tiles.
    """
    pyramid = Pyramid.of(image.size, longest, tile)
    for level in range(pyramid.levels):
        (folder / str(level)).mkdir(parents=True, exist_ok=True)
    _tile(image, pyramid, folder, (0, 0, 0))
    return pyramid


def _tile(image: Regions, pyramid: Pyramid, folder: Path, place: tuple[int, int, int]) -> Image.Image:
    """Make and write the tile at (level, column, row), and all below it."""
    level, column, row = place
    box = pyramid.box(*place)
    if level == pyramid.levels - 1:
        made = _read(image, pyramid, box)
    else:
        width, height = pyramid.level_size(level + 1)
        edge = 2 * pyramid.tile
        across, down = min(edge, width - column * edge), min(edge, height - row * edge)
        four = Image.new("RGB", (across, down))
        for dy in range(math.ceil(down / pyramid.tile)):
            for dx in range(math.ceil(across / pyramid.tile)):
                child = _tile(image, pyramid, folder, (level + 1, 2 * column + dx, 2 * row + dy))
                four.paste(child, (dx * pyramid.tile, dy * pyramid.tile))
        made = four.reduce(2)
    made.save(folder / str(level) / f"{column}_{row}.jpg", quality=QUALITY)
    return made


def _read(image: Regions, pyramid: Pyramid, box: tuple[int, int, int, int]) -> Image.Image:
    """A tile of the last level, from the slide."""
    left, top, right, lower = box
    across, down = image.size[0] / pyramid.size[0], image.size[1] / pyramid.size[1]
    x, y = round(left * across), round(top * down)
    width, height = round(right * across) - x, round(lower * down) - y
    return image.region(x, y, width, height, right - left, lower - top).convert("RGB")
