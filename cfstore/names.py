"""Names on disk to identifiers: slide ids, TCGA patient ids, scales in folder names.

Suffixes are only stripped when they are known: `TCGA-02-0047-01Z-00-DX1.4755D138` has a dot
inside, so `Path.stem` or `rstrip` would damage it.
"""

from __future__ import annotations

import re
from typing import Final

from cfstore.types import SCALES

FEATURE_SUFFIXES: Final = (".h5", ".pt")
SLIDE_SUFFIXES: Final = (
    ".svs", ".tiff", ".tif", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".czi", ".dcm", ".qptiff",
)  # fmt: skip

_TCGA_PATIENT: Final = re.compile(r"^TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}(?=$|-)", re.IGNORECASE)
_SCALE_FOLDER: Final = re.compile(r"^(?:x(\d+)|(\d+)x(?:_.*)?)$", re.IGNORECASE)


def strip_suffixes(name: str) -> str:
    """The slide id in a file name or table cell: known suffixes removed, nothing else.

    >>> strip_suffixes("TCGA-02-0047-01Z-00-DX1.4755D138.svs")
    'TCGA-02-0047-01Z-00-DX1.4755D138'
    >>> strip_suffixes("TCGA-02-0047-01Z-00-DX1.4755D138")
    'TCGA-02-0047-01Z-00-DX1.4755D138'
    """
    name = name.strip()
    for suffixes in (FEATURE_SUFFIXES, SLIDE_SUFFIXES):
        for suffix in suffixes:
            if name.lower().endswith(suffix) and len(name) > len(suffix):
                name = name[: -len(suffix)]
                break
    return name


def tcga_patient_id(name: str) -> str | None:
    """The 12-character patient barcode at the start of a TCGA slide or sample name, else None.

    >>> tcga_patient_id("TCGA-BS-A0T9-01Z-00-DX1.9F2A")
    'TCGA-BS-A0T9'
    """
    match = _TCGA_PATIENT.match(name.strip())
    return match.group(0).upper() if match else None


def scale_of_folder(name: str) -> int | None:
    """The scale that a folder name states (`x20`, `20x`, `20x_256px_0px_overlap`), else None."""
    match = _SCALE_FOLDER.match(name)
    if match is None:
        return None
    scale = int(match.group(1) or match.group(2))
    return scale if scale in SCALES else None
