"""One model in training on one fold: its weights, where it stands, and what it has measured so far.

Where it stands is (pass, own steps of that pass that are done). All else that decides what comes next is a
function of that, of the settings and of the data, so a learner taken from a checkpoint goes on exactly there,
beside other learners or alone, in one process or several.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cftrain.checkpoints import read_tensors, save_weights, write_tensors
from cftrain.config import ModelOption, RunConfig
from cftrain.data import RunData
from cftrain.errors import NonFiniteError, RunError
from cftrain.feed import Work
from cftrain.folds import FoldExamples
from cftrain.loop import Bags, Task, learning_rate, predict, train_step
from cftrain.models import SurvivalModel, build
from cftrain.order import Schedule, Step, pack_seed, shared_out, steps_of
from cftrain.ranks import Ranks
from cftrain.results import Epoch, FoldResult, Predictions, predictions_of, scores, without_nan
from cftrain.run_directory import CHECKPOINT
from cftrain.survival import TimeBins, class_weights, fit_bins
from cftrain.training_fold import FoldData
from cftrain.zoo import model_info


@dataclass
class _EpochSoFar:
    """What the epoch in training has added up to."""

    loss_sum: float = 0.0
    n_visits: int = 0
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        return self.loss_sum / self.n_visits if self.n_visits else math.nan


def build_options(config: RunConfig) -> dict[str, ModelOption]:
    """The options that the configured model is built with: its own, and its number of outputs."""
    return {**config.model.options, "n_bins": config.n_outputs}


def make_model(config: RunConfig, feature_dim: int) -> SurvivalModel:
    """The configured model with fresh weights."""
    return build(config.model.name, feature_dim, **build_options(config))


def seconds_before(out: Path) -> float:
    """Seconds that the run had lasted at the checkpoint in a fold's directory `out`; 0 where there is none.

    Raises
    ------
    RunError
        The checkpoint cannot be read.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return 0.0
    _, text = read_tensors(path)  # maps the tensors, and reads none
    try:
        return float(json.loads(text)["elapsed"])
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(path, error) from error


class Learner:
    """Trains one fold, step by step, as the passes over the cohort bring its examples by.

    An inner learner is one whose fold is inner: it leaves metrics.jsonl and no weights. The fold that it chooses an
    epoch for trains to the end of the schedule, also where patience has ended what its other rules look at, and
    keeps what it predicts after every epoch.

    Parameters
    ----------
    out
        Its directory: metrics.jsonl, weights and the checkpoint go there.
    """

    def __init__(self, config: RunConfig, data: RunData, fold: FoldExamples, out: Path, device: torch.device) -> None:
        self.config, self.fold, self.out, self.device, self._data = config, fold, out, device, data
        self.bins = bins_of(config, data, fold)
        self.schedule = Schedule(
            fold=fold,
            seed=config.train.seed,
            epochs=config.train.epochs,
            accumulate=config.train.accumulate,
            batch_patches=config.train.batch_patches,
            trains=model_info(config.model.name).by_gradient,
            weights=_weights(config, fold, self.bins),
        )
        torch.manual_seed(config.train.seed * 1000 + fold.number)
        self.model = make_model(config, data.cohort.dim).to(device)
        self.validated: SurvivalModel | None = None
        """The weights after the epoch before: those that are validated while the next epoch trains."""
        parameters = [{"params": list(self.model.parameters())}]  # a model that is only fitted has none
        self.optimizer = torch.optim.Adam(
            parameters, lr=config.train.learning_rate, weight_decay=config.train.weight_decay, fused=True
        )
        self.number = 0
        """The pass it is in; pass `epochs` only validates."""
        self.steps_done = 0
        self.finished = False
        self.epochs: list[Epoch] = []
        self.best: int | None = None
        """Index into `epochs`."""
        self.work = Work()
        self.elapsed = 0.0
        """Seconds that the run had lasted when this learner was last saved."""
        self._begun = self._changed = False
        self._now, self._before = _EpochSoFar(), _EpochSoFar()
        self._val = self._no_predictions()
        self._best = self._no_predictions()
        chosen_for = config.has_inner and not fold.inner
        self._every = torch.stack([self._no_predictions()] * config.train.epochs) if chosen_for else None
        """What it predicted after each epoch, where one is to be chosen: [epochs, examples, K]."""
        self._last: int | None = None
        """The epoch at which patience ran out, if it trains on."""

    def fit(self) -> None:
        """Let a fresh model take from the training examples what no step teaches it."""
        self.model.fit(FoldData(self._data, self.fold, self.bins))

    # -- the passes ------------------------------------------------------------------------------

    def steps(self, places: Mapping[str, int] | None) -> list[Step]:
        """What is left of its pass."""
        return steps_of(self.schedule, self.number, places)[self.steps_done :]

    def begin(self) -> None:
        """Begin a pass, unless it is under way."""
        if self._begun:
            return
        self._begun = self._changed = True
        if self.number > 0:
            if self.validated is None:
                self.validated = copy.deepcopy(self.model).requires_grad_(False)
            self.validated.load_state_dict(self.model.state_dict())
        self._before, self._now = self._now, _EpochSoFar()
        self._val = self._no_predictions()

    def task(self, step: Step, ranks: Ranks) -> Task:
        """What this process does of a step."""
        seeds = (self.config.train.seed, self.fold.number, self.number, step.number)
        return Task(
            packs=step.packs,
            own=tuple(shared_out(step.packs, ranks.world)[ranks.rank]),
            seeds=tuple(pack_seed(*seeds, pack) for pack in range(len(step.packs))),
        )

    def do(self, step: Step, task: Task, bags: Bags, ranks: Ranks) -> None:
        """Train or predict one step.

        Raises
        ------
        NonFiniteError
            A prediction is NaN or Inf, or a loss or gradient is and `train.on_nan` says stop; names the slides.
        """
        if step.train:
            self._train(task, bags, ranks)
        else:
            self._predict(task, bags, ranks)
        self.steps_done += 1
        self._changed = True

    def _train(self, task: Task, bags: Bags, ranks: Ranks) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.train, self.number)
        try:
            loss = train_step(self.model, self.optimizer, task, bags, self.bins, self.config.train, ranks)
        except NonFiniteError as error:
            if self.config.train.on_nan == "stop":
                message = f"{self.fold.name}, epoch {self.number + 1}: {error}; --set train.on_nan=skip goes on"
                raise NonFiniteError(message) from error
            self._now.skipped.append(str(error))
            return
        self._now.loss_sum += loss
        self._now.n_visits += len(task.visits)

    def _predict(self, task: Task, bags: Bags, ranks: Ranks) -> None:
        assert self.validated is not None  # noqa: S101 - `begin` made it
        rows = {example.name: row for row, example in enumerate(self.fold.val)}
        found = predict(self.validated, task, bags, self.config.n_outputs, ranks)
        self._val[[rows[visit.example.name] for visit in task.visits]] = found

    def spent(self, work: Work) -> None:
        """Count what a step cost."""
        self.work = self.work.plus(work)
        self._now.seconds += work.compute_seconds + work.wait_seconds

    def end(self, ranks: Ranks) -> Epoch | None:
        """End a pass: the epoch before it is measured now. Returns it; None after the first pass."""
        epoch = self._measured(ranks) if self.number > 0 else None
        stale = epoch is not None and self._stale(epoch)
        over = self.number >= self.config.train.epochs
        self.finished = over or (stale and self._every is None)
        self.number, self.steps_done, self._begun = self.number + 1, 0, False
        self._changed = True
        if (self.finished or stale) and self._last is None:
            self._keep_weights("last_epoch.safetensors", len(self.epochs), ranks)
            self._last = None if self.finished else len(self.epochs)
        return epoch

    def _stale(self, epoch: Epoch) -> bool:
        patience = self.config.train.patience
        return bool(patience and self.best is not None and epoch.epoch - 1 - self.best >= patience)

    def _keep_weights(self, name: str, epoch: int, ranks: Ranks) -> None:
        """Write the weights under validation; an inner learner's are of no use later."""
        if ranks.first and not self.fold.inner:
            assert self.validated is not None  # noqa: S101 - an epoch was measured
            save_weights(self.validated, self.out / name, epoch=str(epoch))

    def _measured(self, ranks: Ranks) -> Epoch:
        prediction = self._predictions(self._val)
        per_slide, per_patient = scores(self.fold.val, prediction.risk)
        epoch = Epoch(
            epoch=self.number,
            train_loss=self._before.loss,
            val_loss=prediction.loss,
            c_index=per_slide,
            c_index_patient=per_patient,
            lr=learning_rate(self.config.train, self.number - 1),
            seconds=self._before.seconds,
            skipped=tuple(self._before.skipped),
        )
        self.epochs.append(epoch)
        if self._every is not None:
            self._every[epoch.epoch - 1] = self._val
        if self._last is None and _selectable(epoch, self.epochs, self.best, self.config):
            self.best, self._best = len(self.epochs) - 1, self._val.clone()
            self._keep_weights("best_epoch.safetensors", epoch.epoch, ranks)
        if ranks.first:
            with (self.out / "metrics.jsonl").open("a") as log:
                log.write(_line(epoch))
        return epoch

    def result(self) -> FoldResult:
        """What a finished learner yields."""
        assert self.finished and self.best is not None  # noqa: S101, PT018 - asked for only then
        last = self._val if self._every is None or self._last is None else self._every[self._last - 1]
        return FoldResult(
            examples=self.fold,
            bins=self.bins,
            epochs=tuple(self.epochs[: self._last]),
            best=self.best,
            last_prediction=self._predictions(last),
            best_prediction=self._predictions(self._best),
            work=self.work,
            logits=None if self._every is None else self._every.numpy(),
        )

    def _predictions(self, logits: Tensor) -> Predictions:
        return predictions_of(logits, self.fold.val, self.bins, self.config.train.loss)

    def _no_predictions(self) -> Tensor:
        return torch.full((len(self.fold.val), self.config.n_outputs), math.nan, dtype=torch.float64)

    # -- on disk ---------------------------------------------------------------------------------

    def save(self, elapsed: float) -> None:
        """Write the checkpoint, if anything changed since the last: one file, complete or not there at all."""
        if not self._changed:
            return
        self.elapsed, self._changed = elapsed, False
        state = {
            "number": self.number,
            "steps_done": self.steps_done,
            "begun": self._begun,
            "finished": self.finished,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "last": self._last,
            "work": asdict(self.work),
            "elapsed": elapsed,
            "now": asdict(self._now),
            "before": asdict(self._before),
        }
        tensors = self._kept()
        if not self.finished:
            tensors |= _named("model", self.model.state_dict()) | _adam(self.optimizer)
            if self._begun and self.validated is not None:
                tensors |= _named("validated", self.validated.state_dict())
        write_tensors(self.out / CHECKPOINT, tensors, json.dumps(state))

    def _kept(self) -> dict[str, Tensor]:
        """Predictions, by their name in the checkpoint."""
        kept = {"val": self._val, "best": self._best}
        return kept if self._every is None else kept | {"every": self._every}

    def restore(self) -> bool:
        """Go on where the checkpoint stands; False where there is none.

        Raises
        ------
        RunError
            The checkpoint cannot be read, or is not one of this fold with these settings.
        """
        path = self.out / CHECKPOINT
        if not path.exists():
            return False
        tensors, text = read_tensors(path)
        try:
            self._take(json.loads(text), tensors)
        except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise _foreign(path, error) from error
        return True

    def _take(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.number, self.steps_done = state["number"], state["steps_done"]
        self._begun, self.finished = state["begun"], state["finished"]
        self.epochs = [Epoch.of(row) for row in state["epochs"]]
        self.best, self._last = state["best"], state.get("last")
        self.elapsed, self.work = state["elapsed"], Work(**state["work"])
        self._now, self._before = _EpochSoFar(**state["now"]), _EpochSoFar(**state["before"])
        for name, held in self._kept().items():
            if tensors[name].shape != held.shape:
                message = f"predictions are {list(tensors[name].shape)}, the fold needs {list(held.shape)}"
                raise ValueError(message)
            held.copy_(tensors[name])
        if not self.finished:
            self.model.load_state_dict(_under("model", tensors))
            _load_adam(self.optimizer, tensors)
            if self._begun and self.number > 0:
                self.validated = copy.deepcopy(self.model).requires_grad_(False)
                self.validated.load_state_dict(_under("validated", tensors))

    def rewrite_log(self) -> None:
        """Let metrics.jsonl hold the epochs that the checkpoint knows, and no others."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "metrics.jsonl").write_text("".join(_line(epoch) for epoch in self.epochs))


def _foreign(path: Path, error: Exception) -> RunError:
    return RunError(f"{path}: not a checkpoint of this fold ({error}); remove it to train the fold from its start")


def _line(epoch: Epoch) -> str:
    return json.dumps(without_nan(asdict(epoch))) + "\n"


def bins_of(config: RunConfig, data: RunData, fold: FoldExamples) -> TimeBins:
    """Bins from the patients of the training fold, or as the paper's code: from all slides of the cohort.

    To an inner fold its two parts are the cohort: labels of the reported part have no say in what it chooses.

    Raises
    ------
    ConfigError
        Too few deaths for so many bins.
    """
    if config.bins.fitted_on == "train":
        labels = list({each.patient_id: (each.time_months, each.event) for each in fold.train}.values())
    elif fold.inner:
        labels = [(each.time_months, each.event) for each in fold.train + fold.val for _ in each.slide_ids]
    else:
        labels = [(slide.time_months, slide.event) for slide in data.cohort.slides]
    times = np.array([months for months, _ in labels])
    return fit_bins(times, np.array([event for _, event in labels]), config.bins.count)


def _weights(config: RunConfig, fold: FoldExamples, bins: TimeBins) -> NDArray[np.float64] | None:
    if config.train.sampling == "uniform":
        return None
    time_bin = bins.assign(np.array([each.time_months for each in fold.train]))
    return class_weights(time_bin, np.array([each.event for each in fold.train]))


def _selectable(epoch: Epoch, epochs: Sequence[Epoch], best: int | None, config: RunConfig) -> bool:
    """Whether `epoch` is the best so far, among those that may be selected."""
    if epoch.epoch < config.train.first_selectable:
        return False
    return best is None or (math.isfinite(epoch.c_index) and not epoch.c_index <= epochs[best].c_index)


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _adam(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Adam's moments and step counts, by the number of the parameter."""
    states = optimizer.state_dict()["state"]
    return {f"adam.{number}.{name}": value for number, state in states.items() for name, value in state.items()}


def _load_adam(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _under("adam", tensors).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
