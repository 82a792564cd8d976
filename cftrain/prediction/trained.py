"""A finished run, read to be applied: the models of its folds, their scale of risk, and whom they know."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cftrain.checkpoints import load_model
from cftrain.config import RunConfig, load_config
from cftrain.errors import RunError
from cftrain.models import SurvivalModel
from cftrain.run_directory import fold_directory

Weights = Literal["last", "best"]
_RISK: Final = {"last": "risk", "best": "risk_best_epoch"}
_RULE: Final = {"last": "c_index", "best": "c_index_best_epoch"}


@dataclass(frozen=True, eq=False)
class Member:
    """The model of one fold.

    Parameters
    ----------
    fold
        Its number.
    model
        On the CPU, in evaluation mode.
    edges
        Interior edges of its time bins in months.
    risk_mean, risk_sd
        Of the risks that it gave to the slides of its validation fold (ddof=1).
    n_risks
        How many those were.
    weights, digest
        The file of its weights and the sha256 of that.
    """

    fold: int
    model: SurvivalModel
    edges: tuple[float, ...]
    risk_mean: float
    risk_sd: float
    n_risks: int
    weights: Path
    digest: str

    def standardised(self, risk: float) -> float:
        """A risk in standard deviations from the mean of the risks of the slides that the fold was validated on."""
        return (risk - self.risk_mean) / self.risk_sd


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """What a run left behind, as far as applying it needs that.

    Parameters
    ----------
    path
        The run directory.
    config, summary
        config.toml and summary.json.
    rule
        How the epoch of the weights was chosen, in words.
    members
        One per fold.
    patients
        Whom it was trained and validated on, from predictions.parquet: patient to the folds that validated them, whose
        models were not trained on them.
    slides
        Slide to those folds, each with the risk that it gave, in standard deviations from the mean of its own slides.
    """

    path: Path
    config: RunConfig
    summary: Mapping[str, Any]
    rule: str
    members: tuple[Member, ...]
    patients: Mapping[str, frozenset[int]]
    slides: Mapping[str, Mapping[int, float]]

    @property
    def encoder(self) -> str:
        """The encoder whose features it was trained on."""
        return str(self.summary["encoder"])

    @property
    def scales(self) -> tuple[int, ...]:
        """What its models read of a slide."""
        return self.members[0].model.scales

    @property
    def feature_dim(self) -> int:
        """D of the features it was trained on."""
        return self.members[0].model.feature_dim


def read_trained(run: Path, weights: Weights) -> TrainedRun:
    """Read a finished run with the weights of its last or its best epochs.

    Raises
    ------
    RunError
        The run is not finished, a file of it cannot be read, or the validated risks of a fold do not vary.
    WeightsError
        Weights cannot be read.
    """
    needed = ("config.toml", "summary.json", "predictions.parquet")
    missing = [name for name in needed if not (run / name).is_file()]
    if missing:
        message = f"{run}: no {missing[0]}: not a finished run; finish it with `cftrain run --resume --out {run}`"
        raise RunError(message)
    config = load_config(file=run / "config.toml")
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        columns = ["slide_id", "patient_id", "fold", _RISK[weights]]
        rows = pq.read_table(run / "predictions.parquet", columns=columns).to_pydict()
        rule = str(summary["selection"][_RULE[weights]])
        edges = {int(fold["fold"]): tuple(map(float, fold["bin_edges"])) for fold in summary["folds"]}
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        message = f"{run}: the run cannot be read ({error}); run `cftrain run` again"
        raise RunError(message) from error
    folds, risks = np.array(rows["fold"]), np.array(rows[_RISK[weights]], dtype=np.float64)
    members = tuple(_member(run, fold, own, risks[folds == fold], weights) for fold, own in sorted(edges.items()))
    patients, slides = defaultdict[str, set[int]](set), defaultdict[str, dict[int, float]](dict)
    by_fold = {member.fold: member for member in members}
    for patient, slide, fold, risk in zip(rows["patient_id"], rows["slide_id"], rows["fold"], risks, strict=True):
        patients[patient].add(fold)
        slides[slide][fold] = by_fold[fold].standardised(float(risk))
    validated = {patient: frozenset(own) for patient, own in patients.items()}
    return TrainedRun(run, config, summary, rule, members, validated, dict(slides))


def _member(run: Path, fold: int, edges: tuple[float, ...], risk: NDArray[np.float64], weights: Weights) -> Member:
    path = fold_directory(run, fold) / f"{weights}_epoch.safetensors"
    if not path.is_file():
        message = f"{path}: no such weights; copy the whole run directory, or train it again with `cftrain run`"
        raise RunError(message)
    spread = float(risk.std(ddof=1)) if risk.size > 1 else 0.0
    if not spread > 0:
        message = (
            f"{run}: the risks of fold {fold}'s {risk.size} validated slides do not vary, so that its risk cannot be "
            "put on one scale with the other folds'; train with larger folds"
        )
        raise RunError(message)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Member(fold, load_model(path), edges, float(risk.mean()), spread, risk.size, path, f"sha256:{digest}")
