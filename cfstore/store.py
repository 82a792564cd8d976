"""The one object users hold: a feature store on disk."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cfstore import catalog, tables
from cfstore.clinical import ClinicalTable, read_clinical
from cfstore.codecs import DEFAULT_CODEC, get_codec
from cfstore.cohort import Cohort, choose_encoder, encoders_of, read_cohort, read_split_set, split_names
from cfstore.convert import ARRAY_DTYPE, Dtype
from cfstore.derivation import Derivation
from cfstore.derive import DeriveReport, choose_slides, default_derivations, run_derive
from cfstore.derived_reader import DerivedReader, find_underived
from cfstore.engines import EngineName
from cfstore.errors import (
    ClinicalError,
    SlideNotFoundError,
    SourceError,
    SplitsError,
    StoreError,
)
from cfstore.export import ExportFormat, ExportReport, export
from cfstore.info import StoreInfo, read_info, read_slide_rows
from cfstore.ingest import SLIDES_PER_SHARD, IngestReport, prepare, run_ingest
from cfstore.labels import CohortLabels
from cfstore.mirrors import refreshed, remote_of
from cfstore.names import tcga_patient_id
from cfstore.plan import HeldBag, IngestPlan, Key, Progress, make_plan
from cfstore.prototypes import PrototypeSet, fit_folds
from cfstore.query import run_query
from cfstore.reader import SlideReader
from cfstore.remote.bucket import Bucket
from cfstore.removal import CompactReport, ReindexReport, compact, reindex, remove_slides
from cfstore.ring import Allocate, page_aligned
from cfstore.schema import check_name, read_header
from cfstore.selection import shard_order
from cfstore.shard_job import OnError
from cfstore.shards import Format
from cfstore.splits import SplitSet, make_folds, read_splits
from cfstore.types import SCALES, Affine, SlideBags
from cfstore.verify import VerifyReport, verify
from cfstore.writing import commit, is_staged, session

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class IngestOptions:
    """What a user may say about a folder; None means: find out.

    Parameters
    ----------
    cohort, encoder
        Names. Without them the cohort is the clinical table's, else the folder's name, and the
        encoder is what the folders say.
    scale
        5, 10 or 20, where neither folders nor files say.
    clinical, splits
        Clinical table, and folder of `splits_<k>.csv`; by default those lying in the folder.
    dtype
        Stored precision; its error is measured and recorded for every bag. float16 halves the
        bytes at a relative error of about 2e-4; float16-rounded keeps bfloat16's precision,
        which compresses better; int8 has a scale and zero per slide and channel.
    codec
        Compression of the features, one of `cfstore.codecs.CODECS`; None: what suits `dtype`.
    format
        Of the shards: "zarr", or "webdataset" (tars, never compressed).
    """

    cohort: str | None = None
    encoder: str | None = None
    scale: int | None = None
    clinical: Path | None = None
    splits: Path | None = None
    dtype: Dtype = "float16"
    codec: str | None = None
    format: Format = "zarr"

    def chosen_codec(self) -> str:
        """The codec; SourceError where there is no such one, or a tar should be compressed."""
        if self.format == "webdataset":
            if self.codec not in (None, "none"):
                message = f"--codec {self.codec}: tars of --format webdataset are not compressed; leave --codec out"
                raise SourceError(message)
            return "none"
        return get_codec(self.codec or DEFAULT_CODEC[self.dtype], ARRAY_DTYPE[self.dtype]).name


def _writes(method: Callable[Concatenate[Store, P], R]) -> Callable[Concatenate[Store, P], R]:
    """Run a method that writes on the folder that stands for the store, where that lies in a bucket."""

    @wraps(method)
    def write(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.url is None or is_staged(self.path):
            return method(self, *args, **kwargs)
        with session(Bucket(self.url)) as root:
            result = method(Store(root), *args, **kwargs)
        self.path = refreshed(self.path)
        return result

    return write


class Store:
    """A feature store. Use `cfstore.open(path)`."""

    def __init__(self, path: Path, *, of_tars: bool = False) -> None:
        self.path = path
        self.header = read_header(path)
        self._of_tars = of_tars  # an index of tars that lie elsewhere: see `cfstore.open_tars`
        remote = remote_of(path)
        self.url = remote.url if remote else None
        """Its address, where it lies on object storage; `path` is a mirror of its small files then."""

    @property
    def location(self) -> str:
        """What `cfstore.open` finds it by: its address, or its folder, absolute."""
        return self.url or str(self.path.resolve())

    def _check_own(self) -> None:
        if self._of_tars:
            message = "tars opened by themselves are only read; `cfstore ingest` makes a store, which can do this"
            raise StoreError(message)

    def _check_in_folder(self, what: str) -> None:
        self._check_own()
        if self.url:
            message = f"{self.url}: `cfstore {what}` needs the store in a folder; copy it down for that"
            raise StoreError(message)

    # -- reading ---------------------------------------------------------------------------------

    def sql(self, query: str, extra: Mapping[str, pa.Table] | None = None) -> pa.Table:
        """Run one read-only SQL statement over the tables of `docs/sql.md`.

        Raises
        ------
        QueryError
            The statement writes, reaches outside the store, or fails.
        """
        return run_query(self.path, query, extra)

    def slide(self, slide_id: str, encoder: str | None = None) -> SlideBags:
        """All bags of one slide: `store.slide("...").bags[20].features` is [N, D] float.

        Raises
        ------
        SlideNotFoundError
            No such slide, or it has several encoders and none is named.
        """
        with catalog.connect(self.path) as connection:
            query = "SELECT encoder, list(scale) FROM bags WHERE slide_id = ? GROUP BY encoder ORDER BY encoder"
            held = dict(connection.execute(query, [slide_id]).fetchall())
        if not held or (encoder is not None and encoder not in held) or (encoder is None and len(held) > 1):
            what = f"from encoder {encoder}" if encoder else "from one encoder"
            message = (
                f"slide {slide_id!r}: not in {self.path} {what}; encoders that have it: {', '.join(held) or 'none'}"
            )
            raise SlideNotFoundError(message)
        name = encoder or next(iter(held))
        return self.reader(name, sorted(held[name]), [slide_id], with_coords=True).read(slide_id).dequantised()

    def slide_rows(self, slide_id: str) -> dict[str, Any]:
        """What the catalog says of one slide: {"slide": {...}, "patient": {...} or None, "bags": [{...}]}.

        Raises
        ------
        SlideNotFoundError
            No such slide; the message names similar ones.
        """
        return read_slide_rows(self.path, slide_id)

    def reader(
        self,
        encoder: str,
        scales: Sequence[int],
        slide_ids: Sequence[str],
        *,
        with_coords: bool = False,
        allocate: Allocate = page_aligned,
    ) -> SlideReader:
        """A reader of many slides; see `SlideReader`."""
        return SlideReader(
            self.path,
            encoder,
            scales,
            slide_ids,
            with_coords=with_coords,
            allocate=allocate,
        )

    def cohort(
        self,
        name: str | None,
        *,
        encoder: str | None = None,
        scales: Sequence[int] = SCALES,
        where: str | None = None,
    ) -> Cohort:
        """Labelled slides that have every one of `scales`, and what was left out.

        Of the cohort `name`, or of all; and of those the ones for which the SQL condition `where`
        holds, as in "cohort = 'GBMLGG' AND age > 40". See `cfstore.cohort.read_cohort`.
        """
        return read_cohort(self.path, name, encoder, scales, where)

    def encoders_of(self, cohort: str | None, where: str | None = None) -> dict[str, tuple[int, ...]]:
        """Encoders of a cohort (or of slides for which `where` holds), and the scales each has."""
        return encoders_of(self.path, cohort, where)

    def choose_encoder(self, cohort: str | None, encoder: str | None = None, where: str | None = None) -> str:
        """`encoder` if the cohort has it, or its only one; SlideNotFoundError lists what there is."""
        return choose_encoder(self.path, cohort, encoder, where)

    def shard_order(self, encoder: str, slide_ids: Sequence[str]) -> list[list[str]]:
        """The slides of each shard, in the order of its file: reading them so is reading sequentially."""
        return shard_order(self.path, encoder, slide_ids)

    def split_names(self, cohort: str) -> list[str]:
        """Names of the split sets of a cohort."""
        return split_names(self.path, cohort)

    def split_set(self, cohort: str, name: str) -> SplitSet:
        """One split set as folds of patients."""
        return read_split_set(self.path, cohort, name)

    def underived(
        self, derivations: Iterable[Derivation], encoder: str, slide_ids: Sequence[str]
    ) -> dict[Derivation, list[str]]:
        """Slides of which each derivation is missing; derivations that miss none are left out.

        Also those of which it cannot be computed: `derive` says why.
        """
        self._check_own()
        return find_underived(self.path, derivations, encoder, slide_ids)

    def derived(self, derivations: Iterable[Derivation], encoder: str, slide_ids: Sequence[str]) -> DerivedReader:
        """A reader of what was derived of many slides; see `DerivedReader`.

        Raises
        ------
        NotDerivedError
            Something is missing; the message names a slide, the derivation, and the command that computes it.
        """
        self._check_own()
        return DerivedReader(self.path, derivations, encoder, slide_ids)

    def export(
        self,
        directory: Path | str,
        *,
        format: ExportFormat = "webdataset",  # noqa: A002 - as on the command line
        where: str | None = None,
        cohort: str | None = None,
        encoder: str | None = None,
        shard_slides: int = SLIDES_PER_SHARD,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write slides with their labels into a new folder, as WebDataset tars or HDF5; see `cfstore.export`."""
        return export(
            self.path,
            Path(directory),
            form=format,
            where=where,
            cohort=cohort,
            encoder=encoder,
            shard_slides=shard_slides,
            progress=progress,
        )

    def info(self) -> StoreInfo:
        """What the store holds, lacks and left out."""
        return read_info(self.path)

    # -- writing ---------------------------------------------------------------------------------

    def plan(
        self, folder: Path | str, options: IngestOptions | None = None, progress: Progress | None = None
    ) -> IngestPlan:
        """What `ingest` of `folder` would do; writes nothing."""
        return plan_ingest(Path(folder), options or IngestOptions(), self, progress)

    @_writes
    def ingest(
        self,
        folder: Path | str,
        options: IngestOptions | None = None,
        *,
        plan: IngestPlan | None = None,
        on_error: OnError = "stop",
        jobs: int | None = None,
        engine: EngineName = "local",
        address: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> IngestReport:
        """Take a folder of feature files over into the store; nothing is ingested twice.

        Parameters
        ----------
        folder, options
            As for `plan`.
        plan
            What `plan` returned for the same arguments, to look at files only once.
        on_error
            "stop" raises before anything is written where the plan shows a problem; "skip"
            leaves those slides out, reports them, and lists them in `info`.
        jobs
            Processes, or Ray tasks at once; None: one per core (of the cluster), as far as there is work for them.
        engine, address
            "local": processes on this machine. "ray": tasks on the Ray cluster at `address` ("HOST:PORT"), or, without
            one, on a Ray of this machine alone. Every node has to see folder and store under the same path.

        Raises
        ------
        SourceError
            See `cfstore.errors`; the message names file, finding and remedy.
        EngineError
            Ray cannot be had, or a node of it is not fit for the work; what was finished stays.
        """
        self._check_own()
        options = options or IngestOptions()
        codec = options.chosen_codec()
        prepare(self.path)
        plan = plan or self.plan(folder, options)
        if options.cohort is not None:
            self._check_cohort(plan, check_name("cohort", options.cohort, "--cohort"))
        fallback = options.cohort or Path(folder).resolve().name
        cohorts = tables.cohorts_of(plan.clinical, fallback) if plan.clinical else []
        report = run_ingest(
            self.path,
            plan,
            form=options.format,
            codec=codec,
            cohort=options.cohort,
            on_error=on_error,
            jobs=jobs,
            engine=engine,
            address=address,
            progress=progress,
        )
        self._keep_tables(Path(folder).resolve(), plan, report, fallback)
        if plan.splits:
            cohorts = [options.cohort] if options.cohort else cohorts or self._cohorts_of(plan.slide_ids)
            self.import_splits(plan.splits, cohorts[0] if len(cohorts) == 1 else None)
        return report

    def _keep_tables(self, folder: Path, plan: IngestPlan, report: IngestReport, fallback_cohort: str) -> None:
        left_out = [
            {
                "slide_id": problem.slide_id,
                "encoder": problem.encoder,
                "source": str(Path(problem.source).resolve()),
                "error": type(problem.error).__name__,
                "message": str(problem.error),
            }
            for problem in report.problems
        ]

        def keep() -> None:
            tables.write_skipped(self.path, folder, left_out)
            if plan.clinical:
                tables.write_clinical(self.path, plan.clinical, fallback_cohort)
            catalog.reload_tables(self.path)

        commit(self.path, keep)

    @_writes
    def import_clinical(self, file: Path | str, cohort: str | None = None) -> ClinicalTable:
        """Import a clinical table; patients of the same cohort imported before are replaced.

        Raises
        ------
        ClinicalError
            The table cannot be understood, or neither it nor `cohort` names the cohort.
        """
        table = read_clinical(Path(file), cohort)
        if None in table.patients["cohort"].to_pylist():
            message = f"{file}: the table does not name its cohort; name it with --cohort"
            raise ClinicalError(message)

        def keep() -> None:
            tables.write_clinical(self.path, table, "")
            catalog.reload_tables(self.path)

        commit(self.path, keep)
        return table

    @_writes
    def import_splits(self, folder: Path | str, cohort: str | None = None, name: str | None = None) -> SplitSet:
        """Import `splits_<k>.csv` files as one split set (named after the folder by default).

        Raises
        ------
        SplitsError, LeakageError
            The files cannot be used.
        """
        folder = Path(folder)
        cohort = self._only_cohort(cohort, SplitsError)
        with catalog.connect(self.path) as connection:
            patients = dict(
                connection.execute("SELECT patient_id, 1 FROM patients WHERE cohort = ?", [cohort]).fetchall()
            )
            slides = dict(connection.execute("SELECT slide_id, patient_id FROM slides").fetchall())
            listed = catalog.read_labels(connection, self.path).get(cohort, CohortLabels())

        def patient_of(entry: str) -> str:
            if entry in patients:
                return entry
            return slides.get(entry) or listed.patient_of(entry) or tcga_patient_id(entry) or entry

        splits = SplitSet(name or folder.resolve().name, read_splits(folder, patient_of))
        return self._keep_splits(cohort, splits, str(folder.resolve()))

    @_writes
    def make_splits(
        self, n_folds: int = 5, cohort: str | None = None, *, seed: int = 0, name: str | None = None
    ) -> SplitSet:
        """Make folds of the cohort's labelled patients, stratified by event, and keep them."""
        cohort = self._only_cohort(cohort, SplitsError)
        query = (
            "SELECT DISTINCT patient_id, event FROM patients JOIN slides USING (cohort, patient_id) "
            "WHERE cohort = ? AND time_months IS NOT NULL AND event IS NOT NULL ORDER BY patient_id"
        )
        with catalog.connect(self.path) as connection:
            rows = connection.execute(query, [cohort]).fetchall()
        folds = make_folds([patient for patient, _ in rows], [event for _, event in rows], n_folds, seed)
        splits = SplitSet(name or f"made{n_folds}-seed{seed}", folds)
        return self._keep_splits(cohort, splits, f"made by cfstore, {n_folds} folds, seed {seed}, stratified by event")

    def _keep_splits(self, cohort: str, splits: SplitSet, source: str) -> SplitSet:
        def keep() -> None:
            tables.write_splits(self.path, cohort, splits, source)
            catalog.reload_tables(self.path)

        commit(self.path, keep)
        return splits

    # -- deriving --------------------------------------------------------------------------------

    @_writes
    def derive(
        self,
        derivations: Iterable[Derivation] | None = None,
        *,
        encoder: str | None = None,
        cohort: str | None = None,
        slide_ids: Sequence[str] | None = None,
        jobs: int | None = None,
        engine: EngineName = "local",
        address: str | None = None,
        progress: Progress | None = None,
    ) -> DeriveReport:
        """Compute what models need of bags besides features, and keep it; nothing is computed twice.

        Parameters
        ----------
        derivations
            What to compute; None: the 8 nearest patches and the mean at every scale, and parents between scales.
            `Derivation.similar` has to be asked for: it costs N^2.
        encoder
            Of the bags; None: the only one.
        cohort, slide_ids
            Of which slides: of a cohort, or these. None: all that the encoder has.
        jobs, engine, address
            As for `ingest`.
        progress
            Called with slides done and in all.

        Raises
        ------
        SlideNotFoundError
            No such cohort, encoder or slide.
        StoreWriteError
            The store cannot be written; what was computed so far stays.
        EngineError
            Ray cannot be had, or a node of it is not fit for the work; what was computed so far stays.
        """
        self._check_own()
        encoder, chosen = choose_slides(self.path, encoder, cohort, slide_ids)
        wanted = default_derivations(self.path, encoder, chosen) if derivations is None else derivations
        return run_derive(
            self.path, wanted, encoder, chosen, jobs=jobs, engine=engine, address=address, progress=progress
        )

    def prototypes(
        self, encoder: str, scale: int, slide_ids: Sequence[str], n: int, *, seed: int = 0
    ) -> NDArray[np.float32]:
        """k-means centroids of the patches of exactly these slides: those of a training fold.

        Fitted to as many patches of each slide, 100,000 in all, and kept in the store under a digest of the
        slides, their bags, `n` and `seed`: another training set never gets them. Where the store cannot be
        written they are computed and returned all the same.

        Returns
        -------
        [n, D] float32
            Of the largest cluster first.

        Raises
        ------
        SlideNotFoundError
            A slide has no such bag, or none is named.
        DerivationError
            There are fewer patches than `n`.
        """
        self._check_own()
        return PrototypeSet.of(self.path, encoder, scale, slide_ids, n, seed).read()

    def fold_prototypes(
        self,
        n: int,
        splits: str | None = None,
        *,
        scale: int = 20,
        seed: int = 0,
        cohort: str | None = None,
        encoder: str | None = None,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """`prototypes` of the labelled training slides of every fold; returns a row of the SQL table for each.

        Raises
        ------
        SplitsError
            The cohort has several split sets or none, and none is named.
        SlideNotFoundError
            No such cohort, encoder or split set.
        """
        self._check_own()
        return fit_folds(
            self.path, n, splits, scale=scale, seed=seed, cohort=cohort, encoder=encoder, progress=progress
        )

    # -- keeping ---------------------------------------------------------------------------------

    def verify(
        self, *, deep: bool = False, threads: int | None = None, progress: Callable[[int, int], None] | None = None
    ) -> VerifyReport:
        """Check that catalog, shards and every stored byte are what was written; writes nothing.

        Parameters
        ----------
        deep
            Also compare every value with the source files, within the recorded error.
        threads
            Slides checked at once; None: one per core.
        progress
            Called with slides done and in all.

        Raises
        ------
        StoreFormatError
            There is no catalog to compare with, or a file of `tables/` is damaged.
        """
        self._check_in_folder("verify")
        return verify(self.path, deep=deep, threads=threads, progress=progress)

    def reindex(self) -> ReindexReport:
        """Make the catalog anew from the shards and imported tables alone.

        Raises
        ------
        StoreFormatError
            A shard or table is damaged; it is named, and the catalog stays as it was.
        """
        self._check_in_folder("reindex")
        return reindex(self.path)

    @_writes
    def remove(self, slide_ids: Sequence[str], encoder: str | None = None) -> int:
        """Take slides out of the store, of all encoders or of one; returns how many bags went.

        Their space is freed by `compact`. Ingested again, they come back.

        Raises
        ------
        SlideNotFoundError
            One of them is not in the store; nothing was removed then.
        """
        self._check_own()
        return remove_slides(self.path, slide_ids, encoder)

    def compact(self, progress: Callable[[int, int], None] | None = None) -> CompactReport:
        """Free the space of removed slides, and put small shards together.

        Raises
        ------
        DamagedShardError
            A slide is not what was written; its shard is left as it is.
        StoreWriteError
            The store cannot be written; what was compacted so far stays.
        """
        self._check_in_folder("compact")
        return compact(self.path, progress)

    def _cohorts_of(self, slide_ids: Collection[str]) -> list[str]:
        with catalog.connect(self.path) as connection:
            query = "SELECT DISTINCT cohort FROM slides WHERE list_contains(?, slide_id)"
            return [cohort for (cohort,) in connection.execute(query, [list(slide_ids)]).fetchall()]

    def _only_cohort(self, cohort: str | None, error: type[SplitsError]) -> str:
        if cohort is not None:
            return cohort
        with catalog.connect(self.path) as connection:
            query = "SELECT cohort FROM slides UNION SELECT cohort FROM patients ORDER BY 1"
            held = [name for (name,) in connection.execute(query).fetchall()]
        if len(held) != 1:
            message = f"{self.path} has the cohorts {', '.join(held) or 'none yet'}: name one with --cohort"
            raise error(message)
        return str(held[0])

    def _check_cohort(self, plan: IngestPlan, cohort: str) -> None:
        """A slide belongs to one cohort: refuse a second name, which the store could not take over."""
        ids = sorted(plan.slide_ids)
        new = [job.slide_id for job in plan.jobs]  # these take the name, unless they were given another
        with catalog.connect(self.path) as connection:
            query = (
                "SELECT slide_id, slides.cohort FROM slides JOIN internal.shard_slides AS given USING (slide_id) "
                "WHERE list_contains(?, slide_id) AND slides.cohort <> ? "
                "AND (given.cohort IS NOT NULL OR NOT list_contains(?, slide_id)) ORDER BY slide_id LIMIT 1"
            )
            other = connection.execute(query, [ids, cohort, new]).fetchone()
        if other:
            message = (
                f"slide {other[0]} is in the store with cohort {other[1]}, not {cohort}; use that name, "
                "or another --store (a clinical table that lists the slide can name its cohort, too)"
            )
            raise SourceError(message)


def _held(path: Path, encoders: Sequence[str]) -> dict[Key, HeldBag]:
    query = (
        "SELECT slide_id, scale, encoder, digest, dtype, dim, source, source_bytes, source_mtime_ns FROM bags "
        "WHERE list_contains(?, encoder)"
    )
    with catalog.connect(path) as connection:
        rows = connection.execute(query, [list(encoders)]).fetchall()

    def affine_of(slide_id: str, scale: int, encoder: str) -> Affine | None:
        return SlideReader(path, encoder, [scale], [slide_id]).read_rows(slide_id, scale, []).affine

    found: dict[Key, HeldBag] = {}
    for slide_id, scale, encoder, digest, dtype, dim, source, size, mtime in rows:
        affine = partial(affine_of, slide_id, scale, encoder)
        found[slide_id, scale, encoder] = HeldBag(digest, dtype, dim, source, size, mtime, affine)
    return found


def plan_ingest(
    folder: Path, options: IngestOptions, store: Store | None = None, progress: Progress | None = None
) -> IngestPlan:
    """What ingesting `folder` would do, with or without a store that exists already."""
    return make_plan(
        folder,
        encoder=options.encoder,
        scale=options.scale,
        clinical=options.clinical,
        splits=options.splits,
        cohort=options.cohort,
        dtype=options.dtype,
        held=lambda encoders: _held(store.path, encoders) if store else {},
        progress=progress,
    )
