"""Which file in a folder is which bag: slide, scale and encoder from CLAM's, TRIDENT's or plain folders.

- CLAM: `[<encoder>/]x20/{h5_files,pt_files}/<slide>.{h5,pt}`; where both kinds hold a slide,
  the h5 is read, because only it has coordinates.
- TRIDENT: `20x_256px_0px_overlap/features_<encoder>/<slide>.h5`.
- flat: `.h5` or `.pt` files in one folder, or in scale folders (`x20/`, `20x/`).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cfstore.errors import LayoutError, MissingScaleError, SourceError
from cfstore.names import FEATURE_SUFFIXES, scale_of_folder, strip_suffixes
from cfstore.parsers import hdf5
from cfstore.parsers.sources import BagSource
from cfstore.types import SCALES

_TRIDENT_PARENT: Final = re.compile(r"^[\d.]+x_\d+px_\d+px_overlap$")
_STATES_MAGNIFICATION: Final = re.compile(r"^(?:x\d+|[\d.]+x(?:_.*)?)$", re.IGNORECASE)
_CLAM_DIRS: Final = ("h5_files", "pt_files")
_NOT_BAGS: Final = re.compile(r"^(?:patches|slide_features_.*|heatmaps?.*|\..*)$")


@dataclass(frozen=True)
class Discovery:
    """What a folder holds: its layout, its bags, and what was passed over, in words."""

    layout: str
    sources: tuple[BagSource, ...]
    notes: tuple[str, ...]
    unreadable: tuple[tuple[BagSource, SourceError], ...] = ()
    """Files that had to say their scale and cannot be read; their sources say scale 0."""


@dataclass(frozen=True)
class _Folder:
    path: Path
    files: tuple[Path, ...]
    layout: str
    encoder: str | None
    stated: str | None  # name of the folder that states a magnification
    scale: int | None


def _walk(root: Path, notes: list[str]) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Every folder that has feature files, with them; folders that are called like files go into `notes`."""
    for path, folders, names in os.walk(root):
        odd = {name for name in folders if name.lower().endswith(FEATURE_SUFFIXES)}
        notes += [
            f"{Path(path, name).relative_to(root)}: a folder, not a feature file: left out" for name in sorted(odd)
        ]
        folders[:] = sorted(name for name in folders if name not in odd and not _NOT_BAGS.match(name))
        files = tuple(
            Path(path, name)
            for name in sorted(names)
            if name.lower().endswith(FEATURE_SUFFIXES) and not name.startswith(".") and not name.endswith("_patches.h5")
        )
        if files:
            yield Path(path), files


def _lineage(root: Path, path: Path) -> Iterator[Path]:
    """`path` and the folders above it, up to and with `root`."""
    while path != root:
        yield path
        path = path.parent
    yield root


def _name(folder: Path) -> str:
    """Its own name, also for `.` and `..`."""
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def _classify(root: Path, path: Path, files: tuple[Path, ...]) -> _Folder:
    if path.name.startswith("features_") and _TRIDENT_PARENT.match(path.parent.name):
        stated = path.parent.name
        return _Folder(path, files, "trident", path.name.removeprefix("features_"), stated, scale_of_folder(stated))
    layout = "clam" if path.name in _CLAM_DIRS else "flat"
    stating = next((folder for folder in _lineage(root, path) if _STATES_MAGNIFICATION.match(_name(folder))), None)
    if stating is None:
        return _Folder(path, files, layout, None, None, None)
    encoder = stating.parent.name if stating != root and stating.parent != root else None
    return _Folder(path, files, layout, encoder, _name(stating), scale_of_folder(_name(stating)))


def _select(root: Path, folders: list[_Folder], scale: int | None, notes: list[str]) -> list[_Folder]:
    """Folders whose scale is one of ours or is given; others are named in `notes`."""
    chosen = []
    for folder in folders:
        if folder.stated and folder.scale is None:
            notes.append(f"{folder.path.relative_to(root)}: {folder.stated} is none of {SCALES}: left out")
        else:
            chosen.append(folder)
    stated = sorted({folder.scale for folder in chosen if folder.scale is not None})
    if scale is not None and any(s != scale for s in stated):
        message = f"{root}: its folders state the scales {stated}; --scale {scale} is for a folder that does not say"
        raise MissingScaleError(message)
    return chosen


def _prefer_h5(sources: list[BagSource], notes: list[str]) -> list[BagSource]:
    held = {(s.slide_id, s.scale, s.encoder) for s in sources if s.path.parent.name == "h5_files"}
    kept = [s for s in sources if s.path.parent.name != "pt_files" or (s.slide_id, s.scale, s.encoder) not in held]
    if len(kept) < len(sources):
        notes.append(f"{len(sources) - len(kept)} .pt files repeat .h5 files, which have coordinates: the .h5 are read")
    return kept


def _scale_of(folder: _Folder, path: Path, scale: int | None) -> int:
    """The folder's scale, else the given one, else the file's own `target_magnification`."""
    known = folder.scale if folder.scale is not None else scale
    if known is None and path.suffix.lower() == ".h5":
        declared = hdf5.head(path).attributes.get("target_magnification")
        known = int(declared) if declared in SCALES else None
    if known is None:
        message = (
            f"{path}: neither a folder name nor the file's attributes say its scale (CLAM feature files carry none). "
            "Name it yourself, e.g. --scale 20"
        )
        raise MissingScaleError(message)
    return known


def _fallback_encoder(root: Path) -> str:
    folder = root.resolve()
    return folder.parent.name if _STATES_MAGNIFICATION.match(folder.name) else folder.name


def _sources(
    root: Path,
    folders: list[_Folder],
    encoder: str | None,
    scale: int | None,
    unreadable: list[tuple[BagSource, SourceError]],
) -> Iterator[BagSource]:
    for folder in folders:
        own = folder.encoder if folder.layout == "trident" else encoder or folder.encoder
        name = own or _fallback_encoder(root)
        for path in folder.files:
            source = BagSource(path, strip_suffixes(path.name), 0, name)
            try:
                yield replace(source, scale=_scale_of(folder, path, scale))
            except MissingScaleError:
                raise
            except SourceError as error:
                unreadable.append((source, error))


def _choose_encoder(folders: list[_Folder], encoder: str | None, root: Path) -> list[_Folder]:
    """The folders of `encoder`, where folders name several or are TRIDENT's; else it is a name for all of them."""
    held = sorted({folder.encoder for folder in folders if folder.encoder})
    if encoder is None or (len(held) < 2 and folders[0].layout != "trident"):
        return folders
    named = [folder for folder in folders if folder.encoder == encoder]
    if not named:
        message = f"{root}: no folder holds features of {encoder}; name one of {', '.join(held)} with --encoder"
        raise LayoutError(message)
    return named


def discover(root: Path, *, encoder: str | None = None, scale: int | None = None) -> Discovery:
    """Find every bag below `root`.

    Parameters
    ----------
    root
        Folder of feature files; symbolic links to folders are not followed.
    encoder
        Name of the encoder; where folders name several, or are TRIDENT's `features_<encoder>`, which to take.
        None takes it from the folders: TRIDENT's own name, the folder above the scale
        folders, or the name of `root`.
    scale
        Scale of the files where no folder states one.

    Raises
    ------
    LayoutError
        No feature file, several layouts at once, or no such TRIDENT encoder.
    MissingScaleError
        Nothing states the scale, or `scale` contradicts the folders.
    """
    if not root.is_dir():
        message = f"{root}: no such folder"
        raise SourceError(message)
    notes: list[str] = []
    folders = [_classify(root, path, files) for path, files in _walk(root, notes)]
    if not folders:
        message = (
            f"{root}: no .h5 or .pt feature files found. Expected CLAM (x20/h5_files/*.h5), "
            "TRIDENT (20x_256px_0px_overlap/features_<encoder>/*.h5) or a folder of .h5/.pt files"
        )
        raise LayoutError(message)
    counts = Counter(folder.layout for folder in folders)
    if len(counts) > 1:
        where = "; ".join(
            f"{layout}: {next(f.path for f in folders if f.layout == layout)}" for layout in sorted(counts)
        )
        message = f"{root}: several layouts in one folder ({where}); ingest them one by one"
        raise LayoutError(message)
    chosen = _select(root, _choose_encoder(folders, encoder, root), scale, notes)
    unreadable: list[tuple[BagSource, SourceError]] = []
    sources = _prefer_h5(list(_sources(root, chosen, encoder, scale, unreadable)), notes)
    if encoder is None and any(source.encoder == _fallback_encoder(root) for source in sources):
        notes.append(f"encoder {_fallback_encoder(root)!r} is the folder's name; name it yourself with --encoder")
    if any(next(folder.path.glob("*.index.npz"), None) for folder in chosen):
        notes.append("slideflow's .index.npz files (tile centres) are not read: these bags come without coordinates")
    if not sources and not unreadable:
        message = f"{root}: no bag at a scale of {SCALES}: {'; '.join(notes)}"
        raise LayoutError(message)
    return Discovery(next(iter(counts)), tuple(sources), tuple(notes), tuple(unreadable))
