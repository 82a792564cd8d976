"""What a finished run says on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cftrain.cache import size_text
from cftrain.cli.progress import number


def _spread(metric: dict[str, Any]) -> str:
    return f"{number(metric['mean'])} +- {number(metric['std'])}"


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    if summary["synthetic"]:
        lines = ["", "SYNTHETIC DATA: invented by `cfstore synth`, about no real patient", ""]
    else:
        lines = [""]
    rows = _fold_rows(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += ["", *_by_rule(summary, "C-index", "")]
    if "c_index_nested" in summary:
        lines += _by_rule(summary, "C-index, nested", "_nested")
    lines += _by_rule(summary, "C-index, best epoch", "_best_epoch")
    if summary["reference"]:
        oracle, single = summary["reference"]["oracle"], summary["reference"]["best_single_scale"]
        lines.append(
            f"planted risk        {_spread(oracle)} per patient; "
            f"best predictor from {single['scale']}x alone {_spread(single)}"
        )
    lines += _assessed(summary["assessment"])
    p = summary["log_rank_p"]
    lines.append(
        f"log-rank p          {'n/a' if p is None else f'{p:.2g}'}, patients split at the median risk of their fold"
    )
    lines += ["", _limits(summary)]
    skipped = sum(fold["skipped_steps"] for fold in summary["folds"])
    if skipped:
        lines.append(f"{skipped} steps were left out: a loss or gradient was not finite; see metrics.jsonl")
    return lines


def _fold_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The table of folds under its head; three columns for each rule that chose an epoch."""
    chosen = [("nested", "epoch_nested")] if "c_index_nested" in summary else []
    chosen.append(("best_epoch", "best_epoch"))
    head = ["fold", "epochs", "C-index", "per patient"]
    for rule, _ in chosen:
        head += [f"{rule.removesuffix('_epoch')} epoch", "C-index there", "per patient"]
    rows = [head]
    for fold in summary["folds"]:
        row = [str(fold["fold"]), str(fold["epochs"]), number(fold["c_index"]), number(fold["c_index_patient"])]
        for rule, epoch in chosen:
            row += [str(fold[epoch]), number(fold[f"c_index_{rule}"]), number(fold[f"c_index_patient_{rule}"])]
        rows.append(row)
    return rows


def _by_rule(summary: Mapping[str, Any], label: str, suffix: str) -> list[str]:
    """Both C-indices of a rule, and the rule."""
    slide, patient = summary[f"c_index{suffix}"], summary[f"c_index_patient{suffix}"]
    return [
        f"{label:<19} {_spread(slide)} per slide, {_spread(patient)} per patient",
        f"{'':<19} {slide['rule']}",
    ]


def _assessed(found: Mapping[str, Any]) -> list[str]:
    """Uncertainty, censoring-weighted concordance, and how good the probabilities are; all per patient, last epoch."""
    c, uno, brier = found["c_index"], found["uno_c"], found["ibs"]
    lines = [
        f"95 % interval       {number(c['lower'])} to {number(c['upper'])} per patient, last epoch "
        f"({found['replicates']:,} bootstrap resamples)",
        f"Uno's C             {_spread(uno)} per patient, last epoch",
    ]
    if brier["mean"] is not None:
        reference = number(brier["kaplan_meier"])
        lines.append(f"integrated Brier    {_spread(brier)}; of the training fold's Kaplan-Meier curve {reference}")
    return lines


def _limits(summary: Mapping[str, Any]) -> str:
    """Whether reading or computing took the time."""
    share = summary["data_wait_share"]
    waited = "n/a" if share is None else f"{100 * share:.0f} %"
    return (
        f"{summary['slides_per_second']:,.0f} slides/s, {summary['patches_per_second']:,.0f} patches/s, "
        f"{size_text(summary['bytes_read'])} read; waiting for data {waited} of the time, computing the rest; "
        f"peak memory of a process {size_text(summary['peak_memory_bytes'])}"
    )
