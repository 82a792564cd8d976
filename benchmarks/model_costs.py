"""What every model costs on one slide: parameters, operations and memory, counted; seconds and peak memory, measured.

    python benchmarks/model_costs.py --threads 4 --out benchmarks/results/model_costs.json
    python benchmarks/model_costs.py --device cuda --largest --out benchmarks/results/model_costs-cuda.json

Counted are a prediction and a training pass over the average and the largest slide of the paper's cohorts; measured are
those of the average slide, with --largest of both. Every measured pass has a process of its own. What needs more memory
than is free is not tried, and says so. `cftrain models` prints the same for single models.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

import harness  # noqa: E402
import torch  # noqa: E402

import cfkernels  # noqa: E402
from cftrain.costs import SLIDES, PassRow, counted, measured, parameter_count  # noqa: E402
from cftrain.zoo import MODELS  # noqa: E402

SMALL = {5: 16, 10: 64, 20: 256}
COLUMNS = ("model", "slide", "kind", "parameters", "GFLOP", "counted MiB", "peak MiB", "seconds", "problem")


def model_rows(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Prediction and training of each slide."""
    slides = {"small": SMALL} if args.small else SLIDES
    rows = []
    for slide, patches in slides.items():
        for row in counted(name, {}, args.dim, slide, patches, device_type=device.type):
            if slide != "largest" or args.largest:
                sample = harness.measure(
                    lambda row=row: measured(row, {}, args.dim, device=device, repeats=args.repeats)
                )
                rows.append(as_json(sample.result, sample.other_cores))
            else:
                rows.append(as_json(row, None))
    return rows


def as_json(row: PassRow, other_cores: float | None) -> dict[str, Any]:
    """The row; its seconds as quartiles. Cores that others used are of the whole process, its start included."""
    others = None if other_cores is None or not row.seconds else harness.significant(other_cores)
    return asdict(row) | {"seconds": harness.quartiles(row.seconds), "other_cores": others}


def printed(row: dict[str, Any], parameters: dict[str, int]) -> dict[str, Any]:
    """The row as cells."""

    def in_units(value: int | None, unit: float) -> float | None:
        return None if value is None else round(value / unit, 1)

    return row | {
        "parameters": f"{parameters[row['model']]:,}",
        "GFLOP": in_units(row["flops"], 1e9),
        "counted MiB": in_units(row["nbytes"], 2**20),
        "peak MiB": in_units(row["peak_bytes"], 2**20),
        "seconds": row["seconds"] and row["seconds"]["median"],
        "problem": row["problem"] or None,
    }


def main() -> None:
    """Count, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", help="names, separated by commas [default: all]")
    parser.add_argument("--dim", type=int, default=1024, help="width of the features")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", action="store_true", help="measure the largest slide too")
    parser.add_argument("--small", action="store_true", help="a slide of 256 patches alone: does the script work?")
    parser.add_argument("-o", "--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    names = args.models.split(",") if args.models else list(MODELS)
    parameters = {name: parameter_count(name, {}, args.dim) for name in names}
    rows = []
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        rows += model_rows(name, args, device)
    harness.print_table([printed(row, parameters) for row in rows], COLUMNS)
    result = {
        "benchmark": "model_costs",
        "machine": harness.machine() | {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else None},
        "versions": harness.versions(["torch", "triton", "numpy"]),
        **harness.commit(),
        "settings": {"dim": args.dim, "threads": args.threads, "repeats": args.repeats, "device": str(device)},
        "dtype": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "features": "float16, drawn at random",
        "operations": "products of matrices and convolutions, 2 for a multiply-add; element-wise work is not counted",
        "implementations": str(cfkernels.explain(device)).splitlines(),
        "parameters": parameters,
        "rows": rows,
    }
    harness.write_result(result, args.out)


if __name__ == "__main__":  # measured passes are processes that import this file
    main()
