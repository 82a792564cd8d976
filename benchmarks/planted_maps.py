"""Do heatmaps show what was planted? The maps of a model that has learnt it, against the marked patches.

    python benchmarks/planted.py --seed 1 --jobs 4 --epochs 16 --models crossfusion --keep kept
    python benchmarks/planted_maps.py kept --seed 1 --out benchmarks/results/planted_maps_1.json

`cfstore synth` marks patches at 5x and 20x, and the hazard rises with their fractions. Each slide is explained by the
fold that was not trained on it. Printed for each map: the area under the ROC curve of its scores for the marked ones
of its scale, mean over slides (0.5: chance; below: the map avoids what was planted); and the deletion check: how far
the risk falls, in SD, without the 5 % of that scale's patches that score highest, and without random ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import commit, machine, print_table, versions, write_result
from numpy.typing import NDArray
from scipy.stats import rankdata

import cfstore
from cfstore.synth import SHIFT, planted_directions
from cftrain.heatmap.explain import check, explain, standardised_risk
from cftrain.heatmap.subject import Source, find_subject
from cftrain.prediction.trained import read_trained

MAPS = ("coarse-cross", "fine-cross", "gradient", "integrated")
MARKED = (5, 20)


def area_under_curve(scores: NDArray[np.float64], marked: NDArray[np.bool_]) -> float:
    """Probability that a marked patch scores higher than another one, ties half; NaN where all are of one kind."""
    n_marked, n_others = int(marked.sum()), int((~marked).sum())
    if not n_marked or not n_others:
        return float("nan")
    return float((rankdata(scores)[marked].sum() - n_marked * (n_marked + 1) / 2) / (n_marked * n_others))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", type=Path, help="what planted.py --keep left")
    parser.add_argument("--seed", type=int, default=1, help="of the cohort")
    parser.add_argument("--slides", type=int, default=20, help="of each fold")
    parser.add_argument("--out", type=Path)
    told = parser.parse_args()
    trained = read_trained(told.kept / "crossfusion", "last")
    store = cfstore.open(told.kept / "store")
    directions = planted_directions(trained.feature_dim, told.seed)
    loss, device = trained.config.train.loss, torch.device("cpu")
    areas: dict[str, list[float]] = {}
    falls: dict[str, list[tuple[float, float]]] = {}
    for member in trained.members:
        slides = sorted(slide for slide, own in trained.slides.items() if member.fold in own)[: told.slides]
        for slide in slides:
            subject = find_subject(trained, Source(store.path), slide)
            marked = {scale: subject.bags[scale].features @ directions[scale] > SHIFT / 2 for scale in MARKED}
            explained = explain([member], subject, MAPS, loss, device)
            explained = explained._replace(layers=tuple(each for each in explained.layers if each.scale in MARKED))
            for layer in explained.layers:
                areas.setdefault(layer.name, []).append(area_under_curve(layer.scores, marked[layer.scale]))
            risk = standardised_risk([member], loss, device)
            for name, found in check(risk, subject, explained, share=0.05, draws=5, seed=0).items():
                falls.setdefault(name, []).append(
                    (found.risk - found.without_top, found.risk - float(np.mean(found.without_random)))
                )
        print(f"fold {member.fold}: {len(slides)} slides", file=sys.stderr)
    rows: list[dict[str, Any]] = [
        {
            "map": name,
            "area_under_curve": round(float(np.nanmean(own)), 3),
            "sd_over_slides": round(float(np.nanstd(own, ddof=1)), 3),
            "risk_falls_without_top": round(float(np.mean([top for top, _ in falls[name]])), 4),
            "risk_falls_without_random": round(float(np.mean([other for _, other in falls[name]])), 4),
            "slides": int(np.isfinite(own).sum()),
        }
        for name, own in areas.items()
    ]
    print_table(rows, list(rows[0]))
    result = {
        "synthetic": True,
        "seed": told.seed,
        "c_index_patient": trained.summary["c_index_patient"],
        "maps": rows,
        "machine": machine(),
        "versions": versions(["torch", "numpy", "scipy"]),
        **commit(),
    }
    write_result(result, told.out)


if __name__ == "__main__":
    main()
