"""A synthetic cohort to try things on: CLAM-layout feature files, clinical table, splits, oracle.

Everything here is invented and says so: cohort `DEMO`, patients `DEMO-0001`, `"synthetic": true`.

**Labels.** Per patient two fractions are drawn independently, p (tissue type) and q (cell type), both
uniform on [0.05, 0.95]. With z = (p q - E[p q]) / sd(p q), by the law's own moments,

    risk   = β z                                          log relative hazard, β = 1.6
    T      = 60 months · (E / exp(risk))^(1/1.5)          E ~ Exp(1): Weibull, hazard ∝ exp(risk)
    C      = c · U,  U ~ Uniform(0, 1)                    independent of risk; c such that 45 % die in sight
    months = max(0.01, round(min(T, C), 2)),  event = T <= C

Age, sex and site carry no signal.

**Features.** Patch i of a slide at scale s, centred at x_i (in 5x cells), has

    f_i = μ_s + Σ_k φ_k(x_i) a_sk + 8 m_i d_s + ε_i,    ε_i ~ N(0, I)

μ_s and the eight a_sk are fixed per scale; the waves φ_k(x) = √2 cos(w_k·x + b_k) are drawn per slide and
shared by its scales, so that neighbours resemble each other. The unit vectors d_5 (tissue) and d_20
(cell) are orthogonal to each other and to every μ and a: the shift is 8 noise sds of one patch. m marks
round(p N_5) of the 5x patches, a coherent region, and round(q N_20) of the 20x patches, scattered;
nothing at 10x. So p shows at 5x only, q at 20x only, and neither needs coordinates. Bags of a few patches
show p coarsely.

**What a model can reach.** E[p q | p] ∝ p (p, q independent), so no predictor from 5x alone ranks better
than p; likewise q from 20x; 10x knows nothing: 0.5 by definition. The C-indices of p q, p and q, over
patients, are in `synth.json`: 0.84 ± 0.03 for the oracle and 0.76 ± 0.03 for the better of p and q over 20
seeds of 100 slides, 0.84 ± 0.01 and 0.73 ± 0.01 for 1,000.

**Bags.** 20x sizes are log-normal (σ = 0.8) around the wanted mean. A star-shaped region of 5x cells
splits into 2x2 10x cells each, these into 2x2 20x cells; outer parents lose one child each, so that sizes
are 895 : 3,449 : 13,496 as in TCGA. Coordinates are level-0 pixels of a slide scanned at 20x.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
from lifelines.utils import concordance_index
from numpy.typing import NDArray

from cfstore.errors import LayoutError
from cfstore.types import SCALES

COHORT: Final = "DEMO"
STEP: Final = {5: 1024, 10: 512, 20: 256}  # level-0 pixels between neighbouring 256-px patches
N_FOLDS: Final = 5
MEAN_PATCHES: Final = {5: 895, 10: 3_449, 20: 13_496}  # TCGA
SIZE_SIGMA: Final = 0.8  # of log bag size: the largest of 1,000 slides is about 10 times the mean
TWO_SLIDES: Final = 0.08  # of the patients
FRACTIONS: Final = (0.05, 0.95)  # range of p and q
BETA: Final = 1.6
WEIBULL_SHAPE: Final = 1.5
WEIBULL_MONTHS: Final = 60.0
EVENT_FRACTION: Final = 0.45
SHIFT: Final = 8.0  # along a planted direction, in noise sds
RANK: Final = 8
BLOCK_VALUES: Final = 2**20  # features generated at a time
MODEL: Final = {
    "tissue_scale": 5, "cell_scale": 20, "fractions": FRACTIONS, "beta": BETA, "weibull_shape": WEIBULL_SHAPE,
    "weibull_months": WEIBULL_MONTHS, "event_fraction": EVENT_FRACTION, "shift": SHIFT, "rank": RANK,
    "size_sigma": SIZE_SIGMA,
}  # fmt: skip
CLINICAL_COLUMNS: Final[list[object]] = [
    "cohort", "case_id", "slide_id", "survival_months", "censorship", "age", "is_female", "oncotree_code",
    "site", "synthetic", "oracle_risk", "oracle_5x", "oracle_20x",
]  # fmt: skip

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SynthSummary:
    """What `synthesize` wrote.

    `n_patches` totals the bags per scale; the C-indices are over patients, `c_index_single_scale`
    that of the best predictor which sees one scale only (10x: 0.5 by definition).
    """

    directory: Path
    n_slides: int
    n_patients: int
    n_patches: dict[int, int]
    dim: int
    seed: int
    c_index_oracle: float
    c_index_single_scale: dict[int, float]
    c_index_best_single_scale: float


@dataclass(frozen=True)
class _Cohort:
    """Arrays by patient [P]; `months` and `event` are the observed follow-up."""

    slides: list[tuple[str, int]]  # slide id, index of its patient
    patients: list[str]
    tissue: Doubles
    cell: Doubles
    risk: Doubles
    months: Doubles
    event: NDArray[np.bool_]


def synthesize(
    directory: Path,
    *,
    slides: int = 100,
    patches: int = MEAN_PATCHES[20],
    dim: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SynthSummary:
    """Write a synthetic cohort whose survival needs two scales together (see the module's text).

    Writes `x5|x10|x20/h5_files/<slide>.h5` as CLAM does, `clinical.csv` with MCAT's columns
    (and `synthetic`, and the planted risk and fractions as `oracle_*`, so that SQL and reports see them),
    `splits/splits_<0…4>.csv`, `oracle.csv` (p, q and risk per slide) and, last, `synth.json`. The
    same arguments write the same bytes (another BLAS may round features differently).

    Parameters
    ----------
    directory
        Created where missing; must be empty.
    slides
        At least 10. About 8 % of the patients have two.
    patches
        Mean 20x patches per slide, at least 16. 10x and 5x follow as 3,449 and 895 to 13,496.
    dim
        Width of the features, at least 8.
    seed
        Not negative. Fixes everything; planted directions by `planted_directions(dim, seed)`.
    progress
        Called after each slide with the slides done and their total.

    Raises
    ------
    LayoutError
        `directory` is a file or holds something already; nothing is written.
    ValueError
        An argument is below its least value.
    """
    _check(directory, {"slides": (slides, 10), "patches": (patches, 16), "dim": (dim, 8), "seed": (seed, 0)})
    rng = np.random.default_rng([seed, 0])
    cohort = _draw_cohort(slides, rng)
    weight = rng.lognormal(sigma=SIZE_SIGMA, size=slides)
    sizes = [max(1, round(patches * w)) for w in weight / weight.mean()]
    loadings = {scale: _loadings(scale, dim, seed) for scale in SCALES}
    n_patches = dict.fromkeys(SCALES, 0)
    for scale in SCALES:
        (directory / f"x{scale}" / "h5_files").mkdir(parents=True)
    for i, (slide_id, patient) in enumerate(cohort.slides):
        fractions = {5: cohort.tissue[patient], 10: 0.0, 20: cohort.cell[patient]}
        for scale, coords, weights in _slide_bags(sizes[i], fractions, np.random.default_rng([seed, 1, i])):
            path = directory / f"x{scale}" / "h5_files" / f"{slide_id}.h5"
            _write_bag(path, coords, weights, loadings[scale], np.random.default_rng([seed, 4, i, scale]))
            n_patches[scale] += len(coords)
        if progress is not None:
            progress(i + 1, slides)
    _write_tables(directory, cohort, rng)
    _write_splits(directory / "splits", cohort, rng)
    summary = SynthSummary(directory, slides, len(cohort.patients), n_patches, dim, seed, **_c_indices(cohort))
    _write_manifest(summary, patches)
    return summary


def planted_directions(dim: int, seed: int) -> dict[int, Floats]:
    """The unit vectors [dim] of the planted signal by scale: 5 (tissue type) and 20 (cell type)."""
    q, _ = np.linalg.qr(np.random.default_rng([seed, 2]).standard_normal((dim, 2)))
    return {5: q[:, 0].astype(np.float32), 20: q[:, 1].astype(np.float32)}


def _check(directory: Path, least: dict[str, tuple[int, int]]) -> None:
    for name, (value, minimum) in least.items():
        if value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        found = "holds files already" if directory.is_dir() else "is a file"
        raise LayoutError(f"{directory}: {found}. Name a new or empty directory for the synthetic cohort")


def _draw_cohort(slides: int, rng: np.random.Generator) -> _Cohort:
    n = round(slides / (1 + TWO_SLIDES))
    low, high = FRACTIONS
    tissue, cell = rng.uniform(low, high, n), rng.uniform(low, high, n)
    mean = ((low + high) / 2) ** 2
    sd = ((mean + (high - low) ** 2 / 12) ** 2 - mean**2) ** 0.5
    risk = BETA * (tissue * cell - mean) / sd
    death = WEIBULL_MONTHS * (rng.exponential(size=n) / np.exp(risk)) ** (1 / WEIBULL_SHAPE)
    censoring = rng.uniform(size=n)
    censoring *= np.quantile(death / censoring, EVENT_FRACTION)
    months = np.maximum(0.01, np.round(np.minimum(death, censoring), 2))
    ids = [f"{COHORT}-{i + 1:04d}" for i in range(n)]
    twice = set(rng.choice(n, slides - n, replace=False).tolist())
    named = [(f"{name}-{j:02d}", i) for i, name in enumerate(ids) for j in range(1, 2 + (i in twice))]
    return _Cohort(named, ids, tissue, cell, risk, months, death <= censoring)


def _slide_bags(size: int, fractions: dict[int, float], rng: np.random.Generator) -> Iterator[tuple[int, Ints, Floats]]:
    """Scale, coords [N, 2] and the weights [N, RANK + 2] of the scale's loadings, coarse to fine."""
    wave, phase = rng.normal(scale=2 * np.pi / 10, size=(2, RANK + 4)), rng.uniform(0, 2 * np.pi, RANK + 4)
    for scale, coords in _nested_coords(size, rng).items():
        waves = np.sqrt(2) * np.cos((coords + STEP[scale] / 2) / STEP[5] @ wave + phase)
        order = np.argsort(waves[:, RANK:].sum(1) if scale == 5 else rng.random(len(coords)), kind="stable")
        marks = np.zeros(len(coords))
        marks[order[: round(fractions[scale] * len(coords))]] = 1
        yield scale, coords, np.column_stack([waves[:, :RANK], np.ones_like(marks), marks]).astype(np.float32)


def _write_bag(path: Path, coords: Ints, weights: Floats, loadings: Floats, rng: np.random.Generator) -> None:
    """One CLAM file, block by block: features = noise + weights [N, R] @ loadings [R, D]."""
    n, dim = len(coords), loadings.shape[1]
    block = max(32, BLOCK_VALUES // dim // 32 * 32)
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (n, dim), np.float32, maxshape=(None, dim), chunks=(32, dim))
        file.create_dataset("coords", data=coords.astype(np.int32), maxshape=(None, 2), chunks=(32, 2))
        for start in range(0, n, block):
            rows = weights[start : start + block] @ loadings
            rows += rng.standard_normal(rows.shape, dtype=np.float32)
            features[start : start + block] = rows


def _loadings(scale: int, dim: int, seed: int) -> Floats:
    """The scale's fixed vectors [RANK + 2, dim]: a_1 … a_RANK, μ and the shift along d (0 at 10x)."""
    rng = np.random.default_rng([seed, 3, scale])
    lengths = np.append(1.5 / np.sqrt(np.arange(1, RANK + 1)), 0.5 * dim**0.5)
    vectors = rng.standard_normal((RANK + 1, dim))
    planted = planted_directions(dim, seed)
    for direction in planted.values():
        vectors -= np.outer(vectors @ direction, direction)
    vectors *= (lengths / np.linalg.norm(vectors, axis=1))[:, None]
    shift = SHIFT * planted[scale] if scale in planted else np.zeros(dim)
    return np.vstack([vectors, shift]).astype(np.float32)


def _nested_coords(size: int, rng: np.random.Generator) -> dict[int, Ints]:
    """Level-0 top-left corners [N, 2] by scale, x-major, about `size` of them at 20x."""
    ratio = {scale: MEAN_PATCHES[scale] / MEAN_PATCHES[20] for scale in SCALES}
    n5 = max(1, round(size * ratio[5]))
    harmonics = np.arange(2, 5)
    amplitude, angle = rng.uniform(0, [0.2, 0.12, 0.08]), rng.uniform(0, 2 * np.pi, 3)

    def distance(cells: Ints, scale: int) -> Doubles:
        """How far out a cell's centre lies, 1 on a contour of the star-shaped region."""
        x, y = np.moveaxis((cells + 0.5) / (scale // 5) - 0.5, -1, 0)
        turn = np.arctan2(y, x)[..., None] * harmonics + angle
        return np.asarray(np.hypot(x, y) / (1 + np.cos(turn) @ amplitude))

    half = int(0.9 * n5**0.5) + 2
    square = np.stack(np.meshgrid(*[np.arange(-half, half + 1)] * 2, indexing="ij"), -1).reshape(-1, 2)
    cells = {5: square[np.argsort(distance(square, 5), kind="stable")[:n5]]}
    for parent, scale in ((5, 10), (10, 20)):
        children = cells[parent][:, None] * 2 + np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
        wanted = round(size * ratio[scale])
        cells[scale] = _drop_outer(children, distance(children, scale), wanted, rng)
    shift = rng.integers(0, 20_000, 2) - cells[5].min(0) * STEP[5]
    return {s: c[np.lexsort((c[:, 1], c[:, 0]))] * STEP[s] + shift for s, c in cells.items()}


def _drop_outer(children: Ints, distance: Doubles, wanted: int, rng: np.random.Generator) -> Ints:
    """Of [P, 4, 2] children about `wanted`: the outer parents lose their outermost child."""
    n_parents = len(children)
    n_drop = min(max(0, 4 * n_parents - wanted), n_parents)
    outer = distance.max(1) * rng.uniform(0.7, 1, n_parents)
    losing = np.argsort(-outer, kind="stable")[:n_drop]
    keep = np.ones((n_parents, 4), np.bool_)
    keep[losing, distance[losing].argmax(1)] = False
    return children[keep]


def _write_tables(directory: Path, cohort: _Cohort, rng: np.random.Generator) -> None:
    n = len(cohort.patients)
    age = np.clip(np.rint(rng.normal(61, 12, n)), 20, 89).astype(int)
    female, site = rng.integers(0, 2, n), rng.integers(1, 7, n)
    clinical: list[list[object]] = [CLINICAL_COLUMNS]
    oracle: list[list[object]] = [["slide_id", "patient_id", "tissue_fraction", "cell_fraction", "risk"]]
    for slide_id, i in cohort.slides:
        follow_up = [f"{cohort.months[i]:.2f}", int(~cohort.event[i])]
        person = [age[i], female[i], COHORT, f"D{site[i]}"]
        drawn = [f"{a[i]:.6f}" for a in (cohort.tissue, cohort.cell, cohort.risk)]
        planted = ["yes", drawn[2], drawn[0], drawn[1]]
        clinical.append([COHORT, cohort.patients[i], f"{slide_id}.svs", *follow_up, *person, *planted])
        oracle.append([slide_id, cohort.patients[i], *drawn])
    _write_csv(directory / "clinical.csv", clinical)
    _write_csv(directory / "oracle.csv", oracle)


def _write_splits(directory: Path, cohort: _Cohort, rng: np.random.Generator) -> None:
    """Folds of patients, deaths and censored dealt out separately, as MCAT writes them."""
    directory.mkdir()
    dealt = np.concatenate([rng.permutation(np.flatnonzero(cohort.event == flag)) for flag in (True, False)])
    for fold in range(N_FOLDS):
        held_out = set(dealt[fold::N_FOLDS].tolist())
        train = [name for i, name in enumerate(cohort.patients) if i not in held_out]
        val = [name for i, name in enumerate(cohort.patients) if i in held_out]
        rows = [[i, *pair] for i, pair in enumerate(zip_longest(train, val, fillvalue=""))]
        _write_csv(directory / f"splits_{fold}.csv", [["", "train", "val"], *rows])


def _write_csv(path: Path, rows: list[list[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _c_indices(cohort: _Cohort) -> dict[str, Any]:
    """What `SynthSummary` says of the oracle and of the best predictors from one scale."""
    oracle, tissue, cell = (
        float(concordance_index(cohort.months, -risk, cohort.event))
        for risk in (cohort.risk, cohort.tissue, cohort.cell)
    )
    return {
        "c_index_oracle": oracle,
        "c_index_single_scale": {5: tissue, 10: 0.5, 20: cell},
        "c_index_best_single_scale": max(tissue, 0.5, cell),
    }


def _write_manifest(summary: SynthSummary, patches: int) -> None:
    values = {key: value for key, value in asdict(summary).items() if key != "directory"}
    about = {
        "synthetic": True,
        "about": "Invented by `cfstore synth`: no patient, slide or tissue in it is real.",
        "cohort": COHORT,
        "mean_patches": patches,
    }
    text = json.dumps(about | values | {"model": MODEL}, indent=2)
    (summary.directory / "synth.json").write_text(text + "\n", encoding="utf-8")
