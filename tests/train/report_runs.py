"""Run directories for the tests of the report, written by hand."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cftrain.report import write_report

N_EPOCHS = 20
METRICS = ["c_index", "c_index_patient", "c_index_best_epoch", "c_index_patient_best_epoch"]


def metric(*folds):
    defined = [value for value in folds if value is not None]
    return {
        "mean": float(np.mean(defined)) if defined else None,
        "std": float(np.std(defined, ddof=1)) if len(defined) > 1 else None,
        "folds": list(folds),
        "n_undefined": len(folds) - len(defined),
    }


def predictions(seed=7, n_patients=183, n_folds=3):
    """Slides of patients with 1 to 3 slides, whole and half months with ties, risks on another scale in every fold."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n_patients):
        fold, hidden = number % n_folds, rng.normal()
        death, censoring = rng.exponential(45 * np.exp(-0.9 * hidden)), rng.uniform(6, 130)
        for slide in range(rng.integers(1, 4)):
            risk = -2 + 0.3 * fold + 0.3 * hidden + rng.normal(0, 0.2)
            rows.append(
                {
                    "slide_id": f"P{number:03d}-DX{slide}",
                    "patient_id": f"P{number:03d}",
                    "fold": fold,
                    "time_months": round(2 * min(death, censoring)) / 2,
                    "event": bool(death <= censoring),
                    "risk": risk,
                    "risk_best_epoch": risk + rng.normal(0, 0.05),
                    **{f"survival_{k}": 0.9**k for k in range(1, 5)},
                }
            )
    return rows


def summary(n_folds=3):
    return {
        "cohort": "BLCA", "model": "crossfusion", "encoder": "uni_v2", "scales": [5, 10, 20], "synthetic": False,
        "preset": "paper", "unit": "slide", "seed": 1234, "n_slides": 3456, "n_patients": 1789, "n_events": 618,
        "excluded": {"no label": 17, "no 5x bag": 23}, "feature_dim": 1536, "n_parameters": 2345678,
        "splits": "five-by-patient", "bins_from": "train fold",
        "selection": {
            "c_index": "last epoch of a schedule fixed beforehand (20 epochs)",
            "c_index_best_epoch": "best epoch on the reported fold (the paper's rule; optimistic)",
        },
        "c_index": metric(0.611, 0.652, 0.703), "c_index_patient": metric(0.622, 0.664, 0.717),
        "c_index_best_epoch": metric(0.643, 0.691, 0.739), "c_index_patient_best_epoch": metric(0.655, 0.687, 0.751),
        "log_rank_p": 0.0123,
        "log_rank": {
            "p": 0.0123, "n_high": 93, "n_low": 90, "split": "risk above the median of its fold", "unit": "patient",
        },
        "reference": None,
        "folds": [
            {
                "fold": fold, "epochs": N_EPOCHS, "best_epoch": 9 + fold, "n_train_slides": 2311 + fold,
                "n_val_slides": 1142 + fold, "n_val_patients": 592 + fold, "n_val_events": 204 + fold,
                "bin_edges": [0.0, 11.5, 24.25 + fold, 51.0, 132.0],
                "c_index": [0.611, 0.652, 0.703][fold], "c_index_patient": [0.622, 0.664, 0.717][fold],
                "c_index_best_epoch": [0.643, 0.691, 0.739][fold],
                "c_index_patient_best_epoch": [0.655, 0.687, 0.751][fold],
                "seconds": 341.0 + fold, "data_wait_seconds": 34.1,
            }
            for fold in range(n_folds)
        ],
        "seconds": 1026.0, "slides_per_second": 67.36, "device": "NVIDIA H100", "std_ddof": 1,
    }  # fmt: skip


def epochs(fold):
    rng = np.random.default_rng(fold)
    for epoch in range(1, N_EPOCHS + 1):
        fall = np.exp(-epoch / 6)
        yield {
            "epoch": epoch, "train_loss": 0.7 + fall + rng.normal(0, 0.01),
            "val_loss": 1.0 + 0.7 * fall + 0.01 * epoch + rng.normal(0, 0.02),
            "c_index": 0.66 - 0.15 * fall + rng.normal(0, 0.015),
            "c_index_patient": 0.68 - 0.15 * fall + rng.normal(0, 0.015), "lr": 2e-4, "seconds": 17.1,
        }  # fmt: skip


def make_run(folder, *, rows=None, config='preset = "paper"\n\n[train]\nlr = 2e-4\nepochs = 20\n', **changes):
    """A finished run as `cftrain run` leaves it, with some of its summary replaced."""
    run = folder / "run"
    content = summary() | changes
    for fold in content["folds"]:
        (run / f"fold_{fold['fold']}").mkdir(parents=True)
        lines = (json.dumps(row) for row in epochs(fold["fold"]))
        (run / f"fold_{fold['fold']}" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (run / "summary.json").write_text(json.dumps(content))
    (run / "config.toml").write_text(config)
    provenance = {
        "versions": {"torch": "2.13.0", "lifelines": "0.30.3"}, "device": "NVIDIA H100", "host": "secret-machine",
        "store": {"uuid": "0b5c2f0e-77aa", "hostname": "secret-machine"}, "git_commit": "af04535",
        "command": ["cftrain", "run", "--cohort", "BLCA"], "started": "2026-11-21T10:00:00Z",
        "digests": {f"shard-{number}": "00ff" for number in range(40)},
    }  # fmt: skip
    (run / "provenance.json").write_text(json.dumps(provenance))
    pq.write_table(pa.Table.from_pylist(rows or predictions()), run / "predictions.parquet")
    return run


def page_of(run):
    return write_report(run).read_text(encoding="utf-8")


def words(page):
    """What a reader sees: text without tags, spaces collapsed, dashes as on a keyboard."""
    body = re.sub(r"<style>.*?</style>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split()).replace("\u2013", "-")


def parsed(svg):
    return ET.fromstring(svg)  # noqa: S314 (written by the code under test)


def mean_of(*folds, **more):
    return metric(*folds) | more


def fold_assessment(number, c, uno, auc, ibs):
    """One fold of an assessment: c and uno with limits, AUC at 12 and 36 months with numbers, Brier with reference."""
    return {
        "fold": number, "n_patients": 592 + number, "n_events": 204 + number,
        "c_index": dict(zip(("value", "lower", "upper"), c, strict=True)),
        "uno_c": dict(zip(("value", "lower", "upper", "tau"), uno, strict=True)),
        "auc": [
            {"time_months": month, "value": value, "n_dead": dead, "n_alive": alive}
            for month, value, dead, alive in auc
        ],
        "auc_mean": auc[0][1],
        "ibs": dict(zip(("value", "kaplan_meier", "from_months", "to_months"), ibs, strict=True)),
        "notes": ["AUC at 36 months rests on 3 dead"] if number == 1 else [],
    }  # fmt: skip


def assessment():
    """As `cftrain.assessment.assess` gives it, with numbers of our own; the last fold lacks what it can lack."""
    return {
        "unit": "patient", "replicates": 1000, "seed": 0,
        "folds": [
            fold_assessment(0, (0.622, 0.571, 0.673), (0.612, 0.552, 0.664, 61.25),
                            [(12.0, 0.701, 31, 507), (36.0, 0.66, 78, 212)], (0.181, 0.203, 1.5, 51.0)),
            fold_assessment(1, (0.664, 0.611, 0.715), (0.643, 0.589, 0.699, 58.0),
                            [(12.0, 0.742, 29, 511), (36.0, 0.64, 3, 188)], (0.174, 0.206, 1.25, 51.0)),
            fold_assessment(2, (0.717, 0.667, None), (None, None, None, None),
                            [(12.0, 0.733, 35, 499), (36.0, None, 81, 0)], (None, None, None, None)),
        ],
        "c_index": mean_of(0.622, 0.664, 0.717, lower=0.638, upper=0.697),
        "uno_c": mean_of(0.612, 0.643, None, lower=0.587, upper=0.667),
        "auc": [
            {"time_months": 12.0, **metric(0.701, 0.742, 0.733)}, {"time_months": 36.0, **metric(0.66, 0.64, None)},
        ],
        "auc_mean": metric(0.701, 0.742, 0.733),
        "ibs": mean_of(0.181, 0.174, None, kaplan_meier=0.2045),
        "calibration": {
            "horizon_months": 36.0,
            "points": [
                {"predicted": 0.1, "observed": 0.15, "lower": 0.08, "upper": 0.24, "n": 357},
                {"predicted": 0.3, "observed": 0.25, "lower": 0.21, "upper": 0.29, "n": 358},
                {"predicted": 0.55, "observed": 0.5, "lower": None, "upper": None, "n": 357},
                {"predicted": 0.7, "observed": None, "lower": None, "upper": None, "n": 1},
            ],
            "ici": 0.0412, "e50": 0.032, "e90": 0.1149,
            "d_calibration": {"statistic": 18.25, "p_value": 0.0324, "counts": [10.0, 20.0, 30.0, 40.0]},
            "notes": ["nobody of the last group is followed for 36 months"],
        },
        "notes": ["AUC at 60 months left out: 1 of 3 folds support it"],
    }  # fmt: skip


def hazard(covariate, ratio, lower, upper, p, n=1789, n_events=618):
    return {
        "covariate": covariate, "hazard_ratio": ratio, "lower": lower, "upper": upper, "p_value": p, "n": n,
        "n_events": n_events,
    }  # fmt: skip


def cox():
    """As `cftrain.survival.regression.cox_regression` gives it, with numbers of our own."""
    risk, age, grade = "risk (per SD within its fold)", "age (per 10 years)", "grade: G3 vs G2"
    return {
        "n": 1789, "n_events": 618,
        "univariable": [
            hazard(risk, 1.8123, 1.6544, 1.9853, 1e-9), hazard(age, 1.2, 1.1, 1.31, 0.0004, 1786, 617),
            hazard(grade, None, None, None, None, 1700, 600), hazard("mutations", 1.0003, 1.0001, 1.0005, 0.0021),
            hazard("rare", 31.0, 4.0, 240.0, 0.001),
        ],
        "multivariable": [
            hazard(risk, 1.6512, 1.4876, 1.8328, 2e-9, 1786, 617), hazard(age, 1.15, 1.05, 1.26, 0.0034, 1786, 617),
        ],
        "multivariable_n": 1786, "multivariable_n_events": 617,
        "left_out": {"smoker": "missing in 1400 of 1789 patients", "site": "constant"},
        "notes": ["multivariable: without grade: too few deaths"],
    }  # fmt: skip


def assessed():
    """What a newer run has in its summary beside `summary()`."""
    return {
        "loss": "nll", "where": None, "assessment": assessment(), "cox": cox(), "patches_per_second": 412345.6,
        "bytes_read": 5 * 1024**3, "data_wait_seconds": 230.0, "compute_seconds": 770.0, "data_wait_share": 0.23,
        "peak_memory_bytes": 1536 * 1024**2,
    }  # fmt: skip
