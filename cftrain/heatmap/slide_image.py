"""The picture of a slide, through OpenSlide: found, opened, read at any magnification."""

from __future__ import annotations

import glob
import importlib
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from cftrain.errors import ConfigError
from cftrain.heatmap.layers import FILE_ORDER, Heatmap

SUFFIXES = (
    ".bif", ".czi", ".dcm", ".mrxs", ".ndpi", ".ome.tif", ".ome.tiff", ".scn", ".svs", ".svslide", ".tif", ".tiff",
    ".vms", ".vmu",
)  # fmt: skip
"""What OpenSlide opens, by the ends of names."""

_AT_ONCE = 1 << 24  # pixels of a level that are read at a time: 64 MiB
_LEAST_MPP, _MOST_MPP = 0.01, 20.0  # outside lie resolutions meant for printers, as 72 dpi


class SlideImage:
    """An open slide; made by `open_slide`, closed as a context manager or by `close`.

    Parameters
    ----------
    path
        The file, for messages.
    slide
        The `openslide.OpenSlide` of it.
    """

    def __init__(self, path: Path, slide: Any) -> None:
        self.path = path
        self._slide = slide

    def __enter__(self) -> SlideImage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    @property
    def size(self) -> tuple[int, int]:
        """Width, height of level 0 in pixels."""
        width, height = self._slide.dimensions
        return int(width), int(height)

    @property
    def mpp(self) -> float | None:
        """Microns per level-0 pixel, the mean of both directions; None where the file does not say."""
        try:
            x, y = (float(self._slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
        except (KeyError, ValueError):
            return None
        mpp = (x + y) / 2
        return mpp if _LEAST_MPP < mpp < _MOST_MPP else None

    def thumbnail(self, longest: int) -> Image.Image:
        """All of the slide with the longer side `longest` pixels long: RGB."""
        width, height = self.size
        zoom = longest / max(width, height)
        return self.region(0, 0, width, height, max(round(width * zoom), 1), max(round(height * zoom), 1))

    def region(self, x: int, y: int, edge_w: int, edge_h: int, out_w: int, out_h: int) -> Image.Image:
        """A rectangle of the slide at any size: RGB, white beyond the border and where nothing was scanned.

        Parameters
        ----------
        x, y, edge_w, edge_h
            Its top-left corner, width and height in level-0 pixels; it may reach over the border.
        out_w, out_h
            Width and height of what is returned. Pixels are means of those of the nearest finer level.

        Raises
        ------
        ConfigError
            The file is damaged there.
        """
        level = self._slide.get_best_level_for_downsample(max(min(edge_w / out_w, edge_h / out_h), 1.0))
        scale = self._slide.level_downsamples[level]
        picture = Image.new("RGB", (out_w, out_h), "white")
        rows = max(min(out_h, int(_AT_ONCE * scale * scale * out_h / (edge_w * edge_h))), 1)
        for top in range(0, out_h, rows):
            bottom = min(top + rows, out_h)
            from_y, to_y = edge_h * top / out_h, edge_h * bottom / out_h
            above = math.floor(from_y)
            band = self._read((x, y + above), level, (edge_w / scale, (to_y - above) / scale))
            box = (0.0, (from_y - above) / scale, edge_w / scale, (to_y - above) / scale)
            picture.paste(band.resize((out_w, bottom - top), Image.Resampling.BOX, box), (0, top))
        return picture

    def _read(self, corner: tuple[int, int], level: int, size: tuple[float, float]) -> Image.Image:
        """Pixels of one level on white, at least `size` of them."""
        whole = (math.ceil(size[0]), math.ceil(size[1]))
        try:
            pixels: Image.Image = self._slide.read_region(corner, level, whole)
        except _openslide().OpenSlideError as error:
            message = f"{self.path}: cannot be read at {corner[0]}, {corner[1]} ({error}); fetch or copy the file again"
            raise ConfigError(message) from error
        flat = Image.new("RGB", whole, "white")
        flat.paste(pixels, mask=pixels.getchannel("A"))
        return flat


def open_slide(path: Path) -> SlideImage:
    """Open a slide.

    Raises
    ------
    ConfigError
        There is no such file, OpenSlide cannot read it, or OpenSlide is not installed.
    """
    openslide = _openslide()
    if not path.exists():
        message = f"{path}: no such slide; name the file, or the folder that holds it"
        raise ConfigError(message)
    try:
        return SlideImage(path, openslide.OpenSlide(path))
    except openslide.OpenSlideUnsupportedFormatError as error:
        message = f"{path}: no slide that OpenSlide reads; convert it, e.g. vips tiffsave IN OUT.tif --tile --pyramid"
        raise ConfigError(message) from error
    except (openslide.OpenSlideError, OSError) as error:
        message = f"{path}: cannot be opened ({error}); fetch or copy the file again"
        raise ConfigError(message) from error


def find_slide(where: Path, slide_id: str) -> Path:
    """The file of a slide: `where` itself, or SLIDE_ID.* in that folder or a folder in it (GDC's are UUID/NAME.svs).

    Raises
    ------
    ConfigError
        There is none, or several.
    """
    if where.is_file():
        return where
    if not where.is_dir():
        message = f"{where}: no such file or folder; name the slide's file, or the folder that holds {slide_id}.svs"
        raise ConfigError(message)
    name = glob.escape(slide_id) + ".*"
    found = sorted(
        path
        for path in (*where.glob(name), *where.glob(f"*/{name}"))
        if path.name.removeprefix(slide_id).lower() in SUFFIXES and path.is_file()
    )
    if not found:
        ends = ", ".join(SUFFIXES)
        message = f"{where}: no file of slide {slide_id} there or one folder down ({ends}); name the file itself"
        raise ConfigError(message)
    if len(found) > 1:
        files = ", ".join(str(path) for path in found)
        message = f"{where}: {len(found)} files of slide {slide_id} ({files}); name one of them"
        raise ConfigError(message)
    return found[0]


def check_fits(image_size: tuple[int, int], heatmap: Heatmap) -> None:
    """Refuse an image that the patches cannot be of: ConfigError where one lies beyond it altogether.

    Tools keep patches that stick out over the right and lower border, so that much is no sign of anything.
    """
    for scale, grid in heatmap.grids.items():
        if grid.unit == FILE_ORDER:
            continue
        (left, top), (right, bottom) = grid.corners.min(axis=0), grid.corners.max(axis=0)
        if right > image_size[0] or bottom > image_size[1] or min(left, top) < -grid.edge:
            message = (
                f"{heatmap.slide_id}: the {scale}x patches lie from {left}, {top} to {right + grid.edge:g}, "
                f"{bottom + grid.edge:g} and the image ends at {image_size[0]}, {image_size[1]}: not the slide that "
                "the patches were cut from (or other coordinates); name the right one"
            )
            raise ConfigError(message)


def _openslide() -> Any:
    """OpenSlide is an extra: everything else works without it."""
    try:
        return importlib.import_module("openslide")
    except (ImportError, OSError) as error:
        message = "slide images need OpenSlide; pip install 'crossfusion-store[slides]'"
        raise ConfigError(message) from error
