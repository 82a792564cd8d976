"""What a fold's training yields: epochs and predictions; and predictions.parquet from all folds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cftrain.assessment import FoldOutcome
from cftrain.examples import Example
from cftrain.feed import Work
from cftrain.folds import FoldExamples
from cftrain.models import SurvivalOutput
from cftrain.survival import PatientLevel, TimeBins, c_index, patient_level
from cftrain.survival.losses import ce_survival, cox_loss, nll_survival


@dataclass(frozen=True)
class Epoch:
    """One line of metrics.jsonl; C-indices are of the validation fold, NaN where undefined.

    `skipped` says of every step that was left out why, and which slides were in it (`train.on_nan`).
    """

    epoch: int
    train_loss: float
    val_loss: float
    c_index: float
    c_index_patient: float
    lr: float
    seconds: float
    skipped: tuple[str, ...] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Epoch:
        """The epoch of a line of JSON."""
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in row.items()}
        return cls(**values | {"skipped": tuple(row["skipped"])})


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions for N examples: risk [N], survival [N, K] (None: the model only ranks), mean loss (alpha 0)."""

    risk: NDArray[np.float64]
    survival: NDArray[np.float64] | None
    loss: float


def predictions_of(logits: Tensor, examples: Sequence[Example], bins: TimeBins, loss: str) -> Predictions:
    """What logits [N, K] float64 mean: survival and risk of hazards, or with "cox" the log hazard as risk."""
    event = torch.tensor([example.event for example in examples])
    months = np.array([example.time_months for example in examples])
    if loss == "cox":
        value = cox_loss(logits[:, 0], torch.from_numpy(months), event, reduction="mean")
        return Predictions(logits[:, 0].numpy(), None, float(value))
    output = SurvivalOutput.from_logits(logits)
    measure = ce_survival if loss == "ce" else nll_survival
    value = measure(logits, torch.from_numpy(bins.assign(months)), event)
    return Predictions(output.risk.numpy(), output.survival.numpy(), float(value))


@dataclass(frozen=True, eq=False)
class Nested:
    """What nested validation chose for a fold, and how its own model does there.

    Parameters
    ----------
    epoch
        From 1.
    c_index, c_index_patient
        On the fold's validation part.
    prediction
        For that part.
    n_held_out, n_held_out_events
        Training patients that the inner model was validated on, and deaths among them; 0 where no choice was left.
    c_index_held_out
        Of the inner model at that epoch, on those; NaN where it is undefined in every epoch, or nobody was held out.
    """

    epoch: int
    c_index: float
    c_index_patient: float
    prediction: Predictions
    n_held_out: int = 0
    n_held_out_events: int = 0
    c_index_held_out: float = math.nan

    @property
    def undecided(self) -> bool:
        """Whether the held-out patients could not say, so that it is the last epoch."""
        return self.n_held_out > 0 and math.isnan(self.c_index_held_out)


@dataclass(frozen=True, eq=False)
class FoldResult:
    """A trained fold: its epochs, and predictions under all selection rules.

    Parameters
    ----------
    logits : [E, N, K] float64, optional
        For the validation part after every epoch of the schedule, where an inner model chooses one of them.
    nested
        What it chose; None before that, and without `train.nested`.
    """

    examples: FoldExamples
    bins: TimeBins
    epochs: tuple[Epoch, ...]
    best: int
    last_prediction: Predictions
    best_prediction: Predictions
    work: Work
    logits: NDArray[np.float64] | None = None
    nested: Nested | None = None

    @property
    def last_epoch(self) -> Epoch:
        return self.epochs[-1]

    @property
    def best_epoch(self) -> Epoch:
        return self.epochs[self.best]


@dataclass(frozen=True, eq=False)
class SlideRows:
    """Examples as rows of slides: a patient's bag gives its risk to each of its slides."""

    slide_id: list[str]
    patient_id: list[str]
    time_months: NDArray[np.float64]
    event: NDArray[np.bool_]
    example: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> SlideRows:
        rows = [(slide, number) for number, example in enumerate(examples) for slide in example.slide_ids]
        own = [examples[number] for _, number in rows]
        return cls(
            slide_id=[slide for slide, _ in rows],
            patient_id=[example.patient_id for example in own],
            time_months=np.array([example.time_months for example in own]),
            event=np.array([example.event for example in own]),
            example=np.array([number for _, number in rows]),
        )

    def patients(self, risk: NDArray[np.float64]) -> PatientLevel:
        """One row per patient, with the mean risk of their slides; `risk` is of examples."""
        return patient_level(self.patient_id, self.time_months, self.event, risk[self.example])


def scores(examples: Sequence[Example], risk: NDArray[np.float64]) -> tuple[float, float]:
    """C-index per slide, and per patient (mean risk of the patient's slides)."""
    rows = SlideRows.of(examples)
    patients = rows.patients(risk)
    per_slide = c_index(rows.time_months, rows.event, risk[rows.example])
    return per_slide, c_index(patients.time_months, patients.event, patients.risk)


def without_nan(value: Any) -> Any:
    """JSON has no NaN: undefined numbers become null, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_predictions(out: Path, results: Sequence[FoldResult]) -> None:
    """One row per validated slide: labels, risk under each rule, and survival per bin (last epoch)."""
    tables = []
    for result in results:
        rows = SlideRows.of(result.examples.val)
        last, best = result.last_prediction, result.best_prediction
        columns = {
            "slide_id": rows.slide_id,
            "patient_id": rows.patient_id,
            "fold": np.full(len(rows.slide_id), result.examples.number),
            "time_months": rows.time_months,
            "event": rows.event,
            "risk": last.risk[rows.example],
            "risk_best_epoch": best.risk[rows.example],
        }
        if result.nested is not None:
            columns["risk_nested"] = result.nested.prediction.risk[rows.example]
        if last.survival is not None:
            survival = last.survival[rows.example]
            columns |= {f"survival_{k + 1}": survival[:, k] for k in range(survival.shape[1])}
        tables.append(pa.table(columns))
    temporary = out / ".predictions.parquet"
    pq.write_table(pa.concat_tables(tables), temporary)
    temporary.replace(out / "predictions.parquet")


def outcomes(results: Sequence[FoldResult]) -> list[FoldOutcome]:
    """What an assessment needs of every fold: its patients' labels and predictions."""
    found = []
    for result in results:
        rows = SlideRows.of(result.examples.val)
        patients = rows.patients(result.last_prediction.risk)
        labels = {each.patient_id: (each.time_months, each.event) for each in result.examples.train}
        found.append(
            FoldOutcome(
                fold=result.examples.number,
                train_time=np.array([months for months, _ in labels.values()]),
                train_event=np.array([event for _, event in labels.values()]),
                patients=patients,
                survival=_patient_survival(rows, patients, result.last_prediction.survival),
                edges=result.bins.edges,
            )
        )
    return found


def _patient_survival(
    rows: SlideRows, patients: PatientLevel, survival: NDArray[np.float64] | None
) -> NDArray[np.float64] | None:
    """Mean survival of the slides of each patient: [P, K]."""
    if survival is None:
        return None
    place = {patient: row for row, patient in enumerate(patients.patient_id.tolist())}
    own = np.array([place[patient] for patient in rows.patient_id])
    total = np.zeros((len(place), survival.shape[1]))
    np.add.at(total, own, survival[rows.example])
    return total / np.bincount(own)[:, None]
