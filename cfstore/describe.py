"""What an ingest understood and did, in lines for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from shutil import disk_usage
from typing import Any

from cfstore.derive import DeriveReport
from cfstore.ingest import IngestReport
from cfstore.plan import IngestPlan, Problem
from cfstore.removal import CompactReport
from cfstore.render import SHOWN, counted, human_bytes, some
from cfstore.verify import VerifyReport


def describe_plan(plan: IngestPlan, store: Path | None) -> Iterator[str]:
    """What was understood of a folder, and what it would take in `store`, which need not exist yet (None: a bucket)."""
    scales = ", ".join(f"{scale}x" for scale in plan.scales)
    yield f"layout     {plan.layout}: scales {scales}"
    yield "encoder    " + ", ".join(f"{name} (D={dim})" for name, dim in sorted(plan.dims.items()))
    yield f"slides     {plan.n_slides} found, {plan.n_present} in the store already, {len(plan.jobs)} to write"
    for note in plan.notes:
        yield f"note       {note}"
    if plan.incomplete:
        listed = [f"{slide} (no {', '.join(f'{s}x' for s in lacking)})" for slide, lacking in plan.incomplete.items()]
        yield f"incomplete {len(listed)} slides lack a scale: {some(listed)}"
    yield from _describe_clinical(plan)
    if plan.splits:
        yield f"splits     {plan.splits}"
    yield (
        f"bytes      {human_bytes(plan.source_bytes)} to read, "
        f"{human_bytes(plan.feature_bytes)} as {plan.dtype} before compression"
    )
    if store is None:
        return
    free = disk_usage(next(folder for folder in (store, *store.absolute().parents) if folder.exists())).free
    yield f"disk       {human_bytes(free)} free" + (
        ": this may not be enough; free space, or name a --store elsewhere" if free < plan.feature_bytes else ""
    )


def _describe_clinical(plan: IngestPlan) -> Iterator[str]:
    if plan.clinical is None:
        yield "clinical   no table found in the folder; add one later with `cfstore clinical FILE`"
        return
    table = plan.clinical
    matched, total = plan.match_clinical()
    yield f"clinical   {table.source} ({table.format})"
    yield f"           {len(table.patients)} patients; {matched} of {total} slides matched"
    for note in table.notes:
        yield f"           {note}"


def describe_report(report: IngestReport) -> Iterator[str]:
    """What was written, and what was left out."""
    if not report.n_slides and not report.problems:
        yield f"done       nothing to write: all {report.n_present} slides are in the store already"
        return
    speed = report.source_bytes / max(report.seconds, 1e-9)
    ratio = f", {report.stored_bytes / report.source_bytes:.2f} of the source" if report.source_bytes else ""
    yield (
        f"done       {report.n_slides} slides ({report.n_bags} bags) in {counted(report.n_shards, 'shard')}: "
        f"{human_bytes(report.source_bytes)} -> {human_bytes(report.stored_bytes)}{ratio}, "
        f"{report.seconds:.1f} s, {human_bytes(speed)}/s"
    )
    yield from _describe_deaths(report.n_restarted, f"{report.n_recovered} slides")
    if report.n_without_coords:
        yield f"note       {report.n_without_coords} of {report.n_bags} bags have no coordinates in their files"
    if report.problems:
        yield f"errors     {len({problem.slide_id for problem in report.problems})} slides left out:"
    for problem in report.problems:
        yield f"left out   {problem.slide_id}: {problem.error}"


def _describe_deaths(n_restarted: int, recovered: str) -> Iterator[str]:
    if n_restarted:
        yield (
            f"note       workers died: {n_restarted} tasks were given out again; "
            f"{recovered} had been written already and count once"
        )


def describe_verify(report: VerifyReport) -> Iterator[str]:
    """What is wrong, a line each, and what was looked at."""
    for finding in report.findings:
        of = f"{finding.slide_id} in {finding.shard}" if finding.slide_id else finding.shard
        yield f"damaged    {of}: {finding.message}"
    speed = report.decoded_bytes / max(report.seconds, 1e-9)
    wrong = {finding.slide_id for finding in report.findings}
    yield (
        f"verified   {counted(report.n_shards, 'shard')}, {report.n_slides} slides ({report.n_bags} bags), "
        f"{human_bytes(report.decoded_bytes)} of features, {report.seconds:.1f} s, {speed / 1e9:.2f} GB/s: "
        + (f"{len(report.findings)} findings, {len(wrong - {None})} slides" if wrong else "all as it was written")
    )
    if report.n_derived:
        yield f"derived    {report.n_derived} arrays of `cfstore derive` were checked, too"
    if report.n_without_source:
        yield f"note       {report.n_without_source} bags could not be compared: their source files are gone"


def describe_compact(report: CompactReport) -> str:
    """What a compaction did, in one line."""
    return (
        f"compacted  {counted(report.n_shards_before, 'shard')} -> {report.n_shards_after}, "
        f"{human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)}; "
        f"{report.n_slides_rewritten} slides rewritten"
    )


def describe_derive(report: DeriveReport) -> Iterator[str]:
    """What was computed, what was there, what was left out and why, and which files were ignored."""
    for name in dict.fromkeys([*report.done, *report.held]):
        done, held = report.done.get(name, 0), report.held.get(name, 0)
        parts = [f"{done} slides" if done else "", f"{held} there already" if held else ""]
        yield f"derived    {name}: {', '.join(part for part in parts if part)}"
    for reason, slides in report.excluded.items():
        yield f"left out   {len(slides)} slides, {reason}: {some(slides)}"
    unread = list(report.unread.values())
    yield from (f"ignored    {reason}" for reason in unread[:SHOWN])
    if unread[SHOWN:]:
        yield f"ignored    {len(unread) - SHOWN} more such files; all of them with --json or `cfstore verify`"
    if not report.n_done:
        what = "nothing to compute" + (": all of it is in the store already" if not report.excluded else "")
        yield f"done       {what}"
        return
    processes = f" in {report.n_processes} processes" if report.n_processes > 1 else ""
    yield f"done       {report.n_done} arrays of {report.n_slides} slides, {report.seconds:.1f} s{processes}"
    yield from _describe_deaths(report.n_restarted, f"{report.n_recovered} arrays")


def describe_cohort(row: Mapping[str, Any]) -> str:
    """A cohort of `StoreInfo.cohorts` in one line: its slides, and how many of them have a label."""
    return (
        f"{row['cohort']}: {row['n_slides']} slides; {row['n_labelled_slides']} with a label, "
        f"of {row['n_labelled_patients']} patients, {row['n_events']} events"
    )


def plan_json(plan: IngestPlan) -> dict[str, Any]:
    """The plan as one JSON object."""
    matched, _ = plan.match_clinical()
    return {
        "layout": plan.layout,
        "scales": plan.scales,
        "encoders": dict(plan.dims),
        "n_slides": plan.n_slides,
        "n_present": plan.n_present,
        "n_to_write": len(plan.jobs),
        "missing_scales": dict(plan.incomplete),
        "clinical": str(plan.clinical.source) if plan.clinical else None,
        "n_matched": matched,
        "splits": str(plan.splits) if plan.splits else None,
        "source_bytes": plan.source_bytes,
        "feature_bytes": plan.feature_bytes,
        "problems": [problem_json(problem) for problem in plan.problems],
    }


def problem_json(problem: Problem) -> dict[str, str]:
    """One slide that cannot be ingested."""
    return {
        "slide_id": problem.slide_id,
        "encoder": problem.encoder,
        "source": problem.source,
        "error": type(problem.error).__name__,
        "message": str(problem.error),
    }


def report_json(plan: IngestPlan, report: IngestReport, store: Path | str) -> dict[str, Any]:
    """Plan and report as one JSON object."""
    done = asdict(report) | {"problems": [problem_json(problem) for problem in report.problems], "store": str(store)}
    return {"plan": plan_json(plan), **done}
