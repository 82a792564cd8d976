"""Why attention pooling misses a planted fraction: ABMIL on 20x, with attention and with its weights held at zero.

    python benchmarks/attention_and_fractions.py --store demo/store --fold 3

Prints one JSON line per variant: C-index of the fold's validation slides per patient, and the rank correlation of
their risk with the planted fraction of marked 20x patches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from cftrain.config import load_config
from cftrain.data import load_data
from cftrain.feed import Feed
from cftrain.fold_training import make_model
from cftrain.loop import evaluate, train_epoch
from cftrain.results import scores
from cftrain.survival import epoch_order, fit_bins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--fold", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    told = parser.parse_args()
    config = load_config(
        flags={"data.cohort": "DEMO", "model.name": "abmil"},
        settings=["train.learning_rate=3e-4", "train.accumulate=4", "train.sampling=uniform"],
    )
    data = load_data(told.store, config.data, "abmil", (20,), seed=0)
    feed = Feed(data, (20,), config.data, torch.device("cpu"))
    fold = data.folds[told.fold]
    times = np.array([slide.time_months for slide in fold.train])
    bins = fit_bins(times, np.array([slide.event for slide in fold.train]), 4)
    fraction = [data.patients[slide.patient_id]["oracle_20x"] for slide in fold.val]
    for variant in ("attention", "attention held at zero"):
        torch.manual_seed(0)
        model = make_model(config, data.cohort.dim)
        if variant != "attention":
            for name, weight in model.named_parameters():
                if name.startswith("attention."):
                    torch.nn.init.zeros_(weight)
                    weight.requires_grad_(False)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=config.train.learning_rate)
        for epoch in range(told.epochs):
            order = epoch_order(len(fold.train), seed=0, epoch=epoch, fold=fold.number)
            train_epoch(model, optimizer, feed, [fold.train[i] for i in order], bins, config.train)
        risk = evaluate(model, feed, fold.val, bins, config.train.batch_patches).risk
        found = {"c_index_patient": scores(fold.val, risk)[1], "rank_correlation": spearmanr(risk, fraction)[0]}
        print(json.dumps({"variant": variant, "fold": fold.number, "epochs": told.epochs, **found}))


if __name__ == "__main__":
    main()
