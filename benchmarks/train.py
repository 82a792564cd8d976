"""Cross-validation of a synthetic cohort: folds fused, folds one by one, and the usual way, in one run.

    python benchmarks/train.py --out benchmarks/results/train.json

The usual way is what published code does with the same model, loss, optimiser and steps: one `torch.save`d float32
file per slide, `torch.load` in the workers of a DataLoader (kept between epochs) with batch size 1, one forward pass
per slide, one fold after the other. All three read features of the same slides, train the same folds for the same
epochs, and validate after each epoch.

Two settings, because the answer depends on what limits the run:

- `reading`: gated attention of width 8 on wide features, so that reading takes the time (the page cache is warm: the
  best case of the usual way, which reads twice the bytes);
- `computing`: gated attention of its published width, which takes most of the time.

The order of the ways is shuffled in every round; ratios are of medians.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from harness import commit, machine, measure, print_table, significant, versions, write_result
from torch.utils.data import DataLoader, Dataset

import cfstore
from cfstore.synth import synthesize
from cftrain.config import RunConfig, load_config
from cftrain.data import RunData
from cftrain.experiment import cross_validate, prepare
from cftrain.folds import FoldExamples
from cftrain.learner import make_model
from cftrain.loop import learning_rate
from cftrain.models import BagBatch
from cftrain.survival import fit_bins
from cftrain.survival.losses import nll_survival

WAYS = ("fused", "one by one", "usual")


@dataclass(frozen=True)
class Case:
    """A cohort and a model."""

    slides: int
    patches: int
    dim: int
    settings: tuple[str, ...]


CASES = {
    "reading": Case(120, 2_000, 1024, ("model.name=abmil", "model.hidden_dim=8", "model.attention_dim=8")),
    "computing": Case(60, 1_000, 1024, ("model.name=abmil",)),
}
QUICK = {"quick": Case(20, 64, 8, ("model.name=abmil", "model.hidden_dim=8", "model.attention_dim=4"))}
COMMON = ("train.sampling=uniform", "train.select_from=1", "data.cache=off", "train.accumulate=32")


class Files(Dataset[tuple[dict[int, torch.Tensor], int]]):
    """One `torch.save`d tensor per slide and scale, as CLAM-like code reads them."""

    def __init__(self, folder: Path, names: Sequence[str], scales: Sequence[int]) -> None:
        self.folder, self.names, self.scales = folder, names, scales

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> tuple[dict[int, torch.Tensor], int]:
        name = self.names[row]
        return {s: torch.load(self.folder / f"x{s}" / f"{name}.pt", weights_only=True) for s in self.scales}, row


def write_files(store: cfstore.Store, data: RunData, folder: Path) -> None:
    """The slides as float32 .pt files."""
    for scale in data.cohort.scales:
        (folder / f"x{scale}").mkdir(parents=True)
    for example in data.examples:
        for scale in data.cohort.scales:
            rows = store.slide(example.name).bags[scale].features.astype(np.float32)
            torch.save(torch.from_numpy(rows), folder / f"x{scale}" / f"{example.name}.pt")


def usual(config: RunConfig, data: RunData, files: Path, workers: int) -> int:
    """Train all folds the usual way; returns how many slides passed through the model."""
    return sum(_usual_fold(config, data, fold, files, workers) for fold in data.folds)


def _usual_fold(config: RunConfig, data: RunData, fold: FoldExamples, files: Path, workers: int) -> int:
    train = config.train
    labels = list({each.patient_id: (each.time_months, each.event) for each in fold.train}.values())
    bins = fit_bins([t for t, _ in labels], np.array([e for _, e in labels]), config.bins.count)
    torch.manual_seed(train.seed)
    model = make_model(config, data.cohort.dim)
    optimizer = torch.optim.Adam(model.parameters(), train.learning_rate, weight_decay=train.weight_decay, fused=True)

    def loader(examples: Sequence[Any], shuffle: bool) -> Any:
        held = Files(files, [example.name for example in examples], model.scales)
        kept = {"num_workers": workers, "persistent_workers": workers > 0}
        return DataLoader(held, batch_size=1, shuffle=shuffle, collate_fn=lambda rows: rows[0], **kept)

    def loss_of(example: Any, bags: dict[int, torch.Tensor]) -> torch.Tensor:
        logits = model(BagBatch.pack([example.name], [bags])).logits
        time_bin = torch.from_numpy(bins.assign(np.array([example.time_months])))
        return nll_survival(logits, time_bin, torch.tensor([example.event]))

    trained, validated, done = loader(fold.train, shuffle=True), loader(fold.val, shuffle=False), 0
    for epoch in range(train.epochs):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, epoch)
        for at, (bags, row) in enumerate(trained, start=1):
            torch.autograd.backward(loss_of(fold.train[row], bags) / train.accumulate)
            done += 1
            if at % train.accumulate == 0 or at == len(fold.train):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        model.eval()
        with torch.no_grad():
            for bags, row in validated:
                loss_of(fold.val[row], bags)
                done += 1
    return done


def ours(config: RunConfig, store: Path, fuse: bool) -> dict[str, Any]:
    """The summary of a run into a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(cross_validate(config, store, Path(folder) / "run", device="cpu", fuse=fuse).summary)


def run_case(case: Case, epochs: int, rounds: int, workers: int, folder: Path) -> list[dict[str, Any]]:
    """All ways, `rounds` times, in ever new order."""
    synthesize(folder / "h5", slides=case.slides, patches=case.patches, dim=case.dim, seed=1)
    store = cfstore.open(folder / "store", create=True)
    store.ingest(folder / "h5", cfstore.IngestOptions(encoder="synthetic"))
    shutil.rmtree(folder / "h5")
    settings = (*COMMON, f"train.epochs={epochs}", *case.settings)
    config = load_config(flags={"data.cohort": "DEMO"}, settings=settings)
    ready = prepare([config], store.path, device="cpu")
    data, resolved = ready.data, ready.configs[0]
    write_files(store, data, folder / "pt")
    slides = [store.slide(example.name) for example in data.examples]
    cohort = sum(int(slide.bags[scale].features.nbytes) for slide in slides for scale in data.cohort.scales)
    trained = epochs * sum(len(fold.train) + len(fold.val) for fold in data.folds)
    rows = []
    for round_number in range(rounds):
        for way in random.sample(WAYS, len(WAYS)):
            if way == "usual":
                sample = measure(lambda: usual(resolved, data, folder / "pt", workers))
                if sample.result != trained:
                    raise RuntimeError(f"{sample.result} slides passed, {trained} were meant to")
                rows.append(
                    {"way": way, "round": round_number, "seconds": sample.wall, "other_cores": sample.other_cores}
                )
                continue
            sample = measure(lambda: ours(resolved, store.path, way == "fused"))  # noqa: B023 - called at once
            summary = sample.result
            rows.append(
                {
                    "way": way,
                    "round": round_number,
                    "seconds": summary["seconds"],
                    "other_cores": sample.other_cores,
                    "wait_share": summary["data_wait_share"],
                    "cohorts_read_per_pass": summary["bytes_read"] / cohort / (epochs + 1),
                }
            )
    return rows


def summarised(rows: Sequence[dict[str, Any]], trained: int) -> list[dict[str, Any]]:
    """Medians by way, and ratios to the usual way."""

    def middle(way: str, key: str) -> float | None:
        values = [row[key] for row in rows if row["way"] == way and key in row]
        return significant(statistics.median(values)) if values else None

    usual_seconds = middle("usual", "seconds") or 1.0
    return [
        {
            "way": way,
            "seconds": middle(way, "seconds"),
            "slides_per_second": significant(trained / (middle(way, "seconds") or 1.0)),
            "times_usual": significant(usual_seconds / (middle(way, "seconds") or 1.0)),
            "wait_share": middle(way, "wait_share"),
            "cohorts_read_per_pass": middle(way, "cohorts_read_per_pass"),
        }
        for way in WAYS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=4, help="of the usual way's DataLoader")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--quick", action="store_true", help="a tiny cohort, to see that everything runs")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    cases = QUICK if told.quick else {name: CASES[name] for name in told.cases.split(",")}
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(["torch", "numpy", "zarr"]),
        **commit(),
        "threads": torch.get_num_threads(),
        "epochs": told.epochs,
        "workers_of_the_usual_way": told.workers,
        "cases": {},
    }
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            rows = run_case(case, told.epochs, told.rounds, told.workers, Path(folder))
        trained = told.epochs * 5 * case.slides
        table = summarised(rows, trained)
        result["cases"][name] = {
            "slides": case.slides, "mean_patches_20x": case.patches, "dim": case.dim, "settings": case.settings,
            "summary": table, "rounds": rows,
        }  # fmt: skip
        print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
        print_table(table, list(table[0]))
    write_result(result, told.out)


if __name__ == "__main__":
    main()
