"""The tables of docs/scale.md, made of the results: what stands between `<!-- table: NAME -->` and `<!-- end -->`.

python benchmarks/scale_tables.py            # rewrites docs/scale.md
python benchmarks/scale_tables.py --check    # exit code 1 where it is not what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

BENCHMARKS: Final = Path(__file__).resolve().parent
RESULTS: Final = BENCHMARKS / "results"
PAGE: Final = BENCHMARKS.parent / "docs" / "scale.md"
_TABLE: Final = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Prices:
    """List prices in US dollars. None of them was looked up: public cloud, a North American region, assumed."""

    gpu_machine_hour: float = 55.0  # 8 H100
    object_month_tb: float = 23.0  # standard class, first tier
    get_thousand: float = 0.0004
    egress_gb: float = 0.05  # to the internet, beyond 150 TB a month
    between_regions_gb: float = 0.02


PRICES: Final = Prices()
MILLION: Final = 1_000_000
ROWS: Final = 895 + 3_449 + 13_496
DIMS: Final = (768, 1024, 1536, 2560)
STORED: Final = {"float16, default codec": 0.434, "float16, uncompressed": 0.503, "int8": 0.254}  # read-vit.json
GET_BYTES: Final = 8 << 20
BANDWIDTHS: Final = {"10 Gbit/s": 1.25, "100 Gbit/s": 12.5, "8 x 100 Gbit/s": 100.0, "32 x 100 Gbit/s": 400.0}
TB: Final = 1e12


def stored_bytes(kind: str, dim: int = 1024, slides: int = MILLION) -> float:
    """Of so many average slides of three scales."""
    return slides * ROWS * dim * 4 * STORED[kind]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(str(cell) for cell in line)} |\n" for line in lines)


def seconds(value: float) -> str:
    """Two significant digits, in ms below a second."""
    return f"{float(f'{value * 1000:.2g}'):g} ms" if value < 1 else f"{float(f'{value:.2g}'):g} s"


def hours(value: float) -> str:
    """In minutes below an hour, in days above two."""
    if value < 1:
        return f"{float(f'{value * 60:.2g}'):g} min"
    return f"{float(f'{value:.2g}'):g} h" if value < 48 else f"{float(f'{value / 24:.2g}'):g} days"


def dollars(value: float) -> str:
    """Two significant digits."""
    return f"${float(f'{value:.2g}'):,.0f}" if value >= 10 else f"${float(f'{value:.2g}'):g}"


def sizes(_: Results) -> str:
    rows = [
        [dim, f"{MILLION * ROWS * dim * 4 / TB:.0f} TB", *(f"{stored_bytes(kind, dim) / TB:.0f} TB" for kind in STORED)]
        for dim in DIMS
    ]
    return table(["D", "float32 as extracted", *STORED], rows)


def catalog(results: Results) -> str:
    found = results["catalog_scale"]["sizes"]
    rows: list[list[object]] = [
        ["shards", *(f"{s['shards']:,}" for s in found)],
        ["files", *(f"{s['files']:,}" for s in found)],
        ["`catalog.duckdb`", *(f"{s['catalog_mib']:,.0f} MiB" for s in found)],
        ["`catalog.parquet`", *(f"{s['snapshot_mib']:,.1f} MiB" for s in found)],
        ["open the store, first answer", *(seconds(s["open"]["seconds"]) for s in found)],
        *(
            [f"SQL: {name}", *(seconds(s["sql"]["seconds"][name]) for s in found)]
            for name in found[0]["sql"]["seconds"]
        ),
        ["slides of the cohort", *(f"{s['cohort']['slides']:,}" for s in found)],
        ["the cohort, as `cftrain run` asks", *(seconds(s["cohort"]["seconds"]) for s in found)],
        ["where its training fold lies", *(seconds(s["fold"]["seconds"]) for s in found)],
        ["memory of that process", *(f"{s['fold']['peak_mib']:,} MiB" for s in found)],
        [
            "where many slides lie, and their memory",
            *(f"{s['many']['slides']:,}: {seconds(s['many']['seconds'])}, {s['many']['own_mib']:,} MiB" for s in found),
        ],
        *(
            [f"ingest of one shard: {name}", *(seconds(s["commit"]["seconds"][name]) for s in found)]
            for name in found[0]["commit"]["seconds"]
        ),
        ["memory of that ingest", *(f"{s['commit']['peak_mib']:,} MiB" for s in found)],
    ]
    return table(["slides", *(f"{s['slides']:,}" for s in found)], rows)


def checked(results: Results) -> str:
    found = results["simulate"]
    rows = [
        [
            what, run["workers"], seconds(run["predicted"]), seconds(run["measured"]), f"{run['ratio']:.2f}",
            f"{run['predicted_speedup']:.2f}", f"{run['speedup']:.2f}",
        ]
        for what in ("ingest", "sweep")
        for run in found[what]["runs"]
    ]  # fmt: skip
    return table(
        ["run", "workers", "predicted", "measured", "predicted / measured", "times one, predicted", "measured"], rows
    )


def throughput(results: Results) -> str:
    rows = [
        [
            row["engine"], row["workers"], f"{row['mb_per_s']['median']:.0f}",
            f"{row['mb_per_s']['q1']:.0f} to {row['mb_per_s']['q3']:.0f}", f"{row['speedup']:.2f}",
        ]
        for row in results["scale"]["ingest"]
    ]  # fmt: skip
    return table(["engine", "workers", "MB/s of source", "quartiles", "times one worker"], rows)


def ingest(results: Results) -> str:
    found = results["simulate"]["million"]["rows"]
    machines = sorted({row["machines"] for row in found})
    storages = sorted({row["storage_gb_per_s"] for row in found})
    by_place = {(row["machines"], row["storage_gb_per_s"]): row for row in found}

    def cell(place: tuple[int, float]) -> str:
        return f"{hours(by_place[place]['hours'])} ({by_place[place]['bound_by']})"

    rows = [[f"{storage:g} GB/s", *(cell((m, storage)) for m in machines)] for storage in storages]
    return table(["storage", *(f"{m} machine{'s' if m > 1 else ''}" for m in machines)], rows)


def sweeps(results: Results) -> str:
    rows = [
        [row["gpus"], f"{row['part']:g}", f"{row['gain']:g}", hours(row["hours"]), f"{row['busy']:.0%}"]
        for row in results["simulate"]["sweeps"]
    ]
    return table(["GPUs", "part of one for each job", "a full GPU does, of one job's work", "hours", "GPUs busy"], rows)


def epochs(_: Results) -> str:
    rows = [
        [kind, f"{nbytes / TB:.0f} TB", *(hours(nbytes / gb / 1e9 / 3600) for gb in BANDWIDTHS.values())]
        for kind, nbytes in ((kind, stored_bytes(kind)) for kind in STORED)
    ]  # fmt: skip
    return table(["a million slides as", "bytes", *(f"{name}: {gb:g} GB/s" for name, gb in BANDWIDTHS.items())], rows)


def costs(_: Results) -> str:
    rows = []
    for kind in STORED:
        nbytes = stored_bytes(kind)
        gets = MILLION * -(-nbytes / MILLION // GET_BYTES)
        rows.append(
            [
                kind,
                *(dollars(nbytes / gb / 1e9 / 3600 * PRICES.gpu_machine_hour) for gb in (12.5, 100.0)),
                f"{gets / 1e6:.0f} million: {dollars(gets / 1000 * PRICES.get_thousand)}",
                dollars(nbytes / 1e9 * PRICES.between_regions_gb),
                dollars(nbytes / 1e9 * PRICES.egress_gb),
                dollars(nbytes / TB * PRICES.object_month_tb),
            ]
        )
    head = [
        "a million slides as", "a GPU machine waiting at 12.5 GB/s", "at 100 GB/s", "GET requests",
        "from another region", "over the internet", "to keep, a month",
    ]  # fmt: skip
    return table(head, rows)


TABLES: Final[Mapping[str, Callable[[Results], str]]] = {
    "sizes": sizes, "catalog": catalog, "checked": checked, "throughput": throughput, "ingest": ingest,
    "sweeps": sweeps, "epochs": epochs, "costs": costs,
}  # fmt: skip
SOURCES: Final = ("catalog_scale", "simulate", "scale")


def read_results() -> dict[str, dict[str, Any]]:
    """The results by name."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in SOURCES}


def filled(page: str, results: Results) -> str:
    """The page with every table made anew."""
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]](results) + found[4], page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where the page is not up to date"
    )
    told = parser.parse_args()
    page = PAGE.read_text()
    now = filled(page, read_results())
    if told.check:
        sys.exit(now != page)
    PAGE.write_text(now)


if __name__ == "__main__":
    main()
