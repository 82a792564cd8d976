"""Multi-scale patch embeddings in a verified, compressed store with SQL over patients and slides.

>>> import cfstore                                        # doctest: +SKIP
>>> store = cfstore.open("cfstore-data")                  # doctest: +SKIP
>>> store.sql("SELECT cohort, count(*) FROM slides GROUP BY cohort")  # doctest: +SKIP
>>> store.slide("TCGA-...").bags[20].features             # doctest: +SKIP
"""

from __future__ import annotations

from cfstore.alignment import Alignment, align, children_of, patch_edge
from cfstore.cohort import Cohort, CohortSlide
from cfstore.derivation import Derivation
from cfstore.derive import DeriveReport
from cfstore.derived_reader import DerivedReader
from cfstore.errors import (
    CacheError,
    ClinicalError,
    DerivationError,
    DuplicateBagError,
    EmptyBagError,
    EngineError,
    LayoutError,
    LeakageError,
    MissingDatasetError,
    MissingScaleError,
    NonFiniteError,
    NotDerivedError,
    PrecisionError,
    QueryError,
    RemoteError,
    ShapeError,
    SlideNotFoundError,
    SourceError,
    SplitsError,
    StoreBusyError,
    StoreError,
    StoreFormatError,
    StoreNotFoundError,
    UnreadableFileError,
)
from cfstore.opening import open_store as open  # noqa: A004 - `cfstore.open(path)` is the contract
from cfstore.processes import end_with_parent
from cfstore.ray_connection import RoomWatch, check_code, code_version, ray_cluster
from cfstore.reader import SlideReader
from cfstore.remote.locate import is_url
from cfstore.splits import Fold, SplitSet, make_folds
from cfstore.store import IngestOptions, Store, plan_ingest
from cfstore.tar_store import open_tars
from cfstore.types import SCALES, Bag, SlideBags

__all__ = [
    "SCALES",
    "Alignment",
    "Bag",
    "CacheError",
    "ClinicalError",
    "Cohort",
    "CohortSlide",
    "Derivation",
    "DerivationError",
    "DeriveReport",
    "DerivedReader",
    "DuplicateBagError",
    "EmptyBagError",
    "EngineError",
    "Fold",
    "IngestOptions",
    "LayoutError",
    "LeakageError",
    "MissingDatasetError",
    "MissingScaleError",
    "NonFiniteError",
    "NotDerivedError",
    "PrecisionError",
    "QueryError",
    "RemoteError",
    "RoomWatch",
    "ShapeError",
    "SlideBags",
    "SlideNotFoundError",
    "SlideReader",
    "SourceError",
    "SplitSet",
    "SplitsError",
    "Store",
    "StoreBusyError",
    "StoreError",
    "StoreFormatError",
    "StoreNotFoundError",
    "UnreadableFileError",
    "align",
    "check_code",
    "children_of",
    "code_version",
    "end_with_parent",
    "is_url",
    "make_folds",
    "open",
    "open_tars",
    "patch_edge",
    "plan_ingest",
    "ray_cluster",
]
