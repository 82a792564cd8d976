"""A training step of CrossFusion: ours against the same model in plain PyTorch, time and peak memory.

    python benchmarks/train_step.py                     # a GPU in bfloat16 where there is one, else the CPU in float32
    python benchmarks/train_step.py --device cpu --bags small,average
    python benchmarks/train_step.py --dry-run                  # tiny bags, kernels in Triton's interpreter, no GPU

Both models get the same weights (released names) and one synthetic slide per step: the loss, backward, and on a GPU
Adam too. Before anything is timed, logits and gradients of both must agree; otherwise no speed is printed. Repeats of
the two alternate, so that a machine that slows down slows both. Peak memory is measured in a process of its own for
each: on the CPU the growth of the resident set, on a GPU the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if "--dry-run" in sys.argv:  # read when the kernels are defined, so before they are imported
    os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "kernels")]

import harness  # noqa: E402
import torch  # noqa: E402
from plain_crossfusion import PlainCrossFusion  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cfkernels  # noqa: E402
from cftrain.models import BagBatch, SurvivalModel, build  # noqa: E402
from cftrain.models.released import from_released, place  # noqa: E402
from cftrain.survival.losses import nll_survival  # noqa: E402

BAGS = {
    "dry": (3, 7, 19),
    "small": (224, 862, 3374),
    "average": (895, 3449, 13496),
    "largest": (8624, 34498, 137990),
}
SCALES = (5, 10, 20)
DROPOUT = {
    "none": "no dropout at all (gradients in evaluation mode)",
    "feed-forward": "training, attention dropout off",
    "all": "training, attention dropout 0.2 too: the published settings",
}
KERNELS = ("attention", "gelu_dropout", "dropout_add", "layer_norm", "mix_layer_norms", "ppeg", "grouped_window_conv")


def make_models(dim: int, dropout: str, device: torch.device, embed_dim: int) -> dict[str, nn.Module]:
    """Both models with the same random weights."""
    torch.manual_seed(0)
    rates = {"dropout": 0.3, "attention_dropout": 0.2 if dropout == "all" else 0.0}
    plain = PlainCrossFusion(embed_dim=embed_dim, backbone_dim=dim, **rates)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    ours = build("crossfusion", dim, embed_dim=embed_dim, **rates)
    ours.load_state_dict(from_released(plain.state_dict(), ours))
    models: dict[str, nn.Module] = {"plain": plain, "ours": ours}
    return {name: model.to(device).train(dropout != "none") for name, model in models.items()}


def make_bags(bag: str, dim: int, device: torch.device) -> dict[int, Tensor]:
    """Features as a store gives them: float16."""
    generator = torch.Generator().manual_seed(1)
    sizes = dict(zip(SCALES, BAGS[bag], strict=True))
    return {
        scale: torch.randn(n, dim, generator=generator, dtype=torch.float16).to(device) for scale, n in sizes.items()
    }


def make_step(
    model: nn.Module, bags: dict[int, Tensor], device: torch.device, *, update: bool, exact: bool = False
) -> Callable[[], tuple[Tensor, Tensor]]:
    """One step as a function, in bfloat16 on a GPU unless `exact`; returns logits and loss."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, weight_decay=4e-6, fused=True) if update else None
    time_bin, event = torch.tensor([1], device=device), torch.tensor([True], device=device)
    batch = BagBatch.pack(["slide"], [bags])
    rounded = device.type == "cuda" and not exact

    def step() -> tuple[Tensor, Tensor]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=rounded):
            if isinstance(model, SurvivalModel):
                logits = model(batch).logits
            else:
                logits = model(*(rows.to(torch.bfloat16 if rounded else torch.float32) for rows in bags.values()))[None]
        loss = nll_survival(logits.float(), time_bin, event, alpha=0.2, reduction="sum")
        loss.backward()
        if adam is not None:
            adam.step()
        return logits.detach(), loss.detach()

    return step


def check(bag: str, args: argparse.Namespace, device: torch.device) -> list[str]:
    """What disagrees between the two without dropout; nothing where all is well.

    Logits in the precision that is timed; then logits and every gradient in float32.
    """
    models = make_models(args.dim, "none", device, args.embed_dim)
    bags = make_bags(bag, args.dim, device)
    wrong = []
    for exact, tolerance in ((False, 3e-2), (True, 1e-4)):
        logits = {n: make_step(m, bags, device, update=False, exact=exact)()[0].float() for n, m in models.items()}
        off = (logits["plain"] - logits["ours"]).abs().max().item()
        if not off <= tolerance:
            wrong.append(f"logits differ by {off:.2e}{' in float32' * exact}")
    tolerance = 1e-3
    largest = max(parameter.grad.norm().item() for parameter in models["plain"].parameters())
    for name, parameter in models["plain"].named_parameters():
        at, half = place(name, "crossfusion")
        gradient = models["ours"].get_parameter(at).grad
        gradient = (gradient if half is None else gradient.chunk(2)[half]).reshape(parameter.shape)
        error, size = (x.norm().item() for x in (gradient - parameter.grad, parameter.grad))
        if not error <= tolerance * size + 1e-3 * tolerance * largest:  # a key's bias has a gradient of rounding
            wrong.append(f"the gradient of {name} is off by {error / size:.1e}")
    return wrong


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one step, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(bag: str, dropout: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times of both, alternating."""
    models = make_models(args.dim, dropout, device, args.embed_dim)
    bags = make_bags(bag, args.dim, device)
    steps = {name: make_step(model, bags, device, update=device.type == "cuda") for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    others: list[float] = []
    for repeat in range(args.warmup + args.repeats):
        for name, step in steps.items():
            sample = harness.measure(lambda step=step: timed(step, device))
            if repeat >= args.warmup:
                seconds[name].append(sample.result)
                others.append(sample.other_cores)
    spread = {name: harness.quartiles(values) for name, values in seconds.items()}
    pairs = [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {"seconds": spread, "times_faster": harness.quartiles(pairs), "others_cores": harness.quartiles(others)}


def peak_of(name: str, bag: str, dropout: str, args: argparse.Namespace, device: torch.device) -> int:
    """Bytes that one step of one model needs at its peak, with weights, gradients and the slide; run alone."""
    models = make_models(args.dim, dropout, device, args.embed_dim)
    model = models.pop(name)
    models.clear()
    step = make_step(model, make_bags(bag, args.dim, device), device, update=device.type == "cuda")
    if device.type == "cuda":
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    harness.reset_peak()
    step()
    return harness.peak_bytes()


def peak_in_own_process(name: str, bag: str, dropout: str, args: argparse.Namespace) -> int | None:
    """`peak_of` in a fresh process; None where it ran out of memory."""
    call = [sys.executable, __file__, "--peak", name, "--bags", bag, "--dropout", dropout, "--device", args.device]
    call += ["--dim", str(args.dim), "--embed-dim", str(args.embed_dim), "--threads", str(args.threads)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}, {bag}, {dropout}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return int(done.stdout)


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--bags", help=f"of {', '.join(BAGS)} [default: small,average on a CPU, average,largest on a GPU]"
    )
    parser.add_argument("--dropout", help=f"of {', '.join(DROPOUT)} [default: all three]")
    parser.add_argument("--dim", type=int, default=1024, help="width of the features")
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="tiny, in the interpreter: does the script work?")
    parser.add_argument("--peak", choices=["plain", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("-o", "--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    dropouts = args.dropout.split(",") if args.dropout else list(DROPOUT)
    if args.peak:
        print(peak_of(args.peak, args.bags, args.dropout, args, device))
        return
    if args.dry_run:
        args.device, args.dim, args.embed_dim, args.warmup, args.repeats = "cpu", 24, 64, 0, 1
        device = torch.device("cpu")
        with cfkernels.using(**dict.fromkeys(KERNELS, "triton")):
            report = run(["dry"], dropouts, args, device)
    else:
        default = "average,largest" if device.type == "cuda" else "small,average"
        report = run((args.bags or default).split(","), dropouts, args, device)
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


def run(bags: list[str], dropouts: list[str], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """All rows; exits 1 before any timing where the models disagree."""
    rows = []
    for bag in bags:
        # the largest bag is checked by the average one: plain PyTorch may not have the memory
        wrong = check(bag if bag != "largest" else "average", args, device)
        if wrong:
            sys.exit(f"{bag}: the two models disagree, nothing was timed: {'; '.join(wrong)}")
        for dropout in dropouts:
            row = {"bag": bag, "patches": BAGS[bag], "dropout": dropout, **compare(bag, dropout, args, device)}
            if not args.dry_run:
                row["peak_bytes"] = {name: peak_in_own_process(name, bag, dropout, args) for name in ("plain", "ours")}
            rows.append(row)
            print_row(row)
    return {
        "benchmark": "train_step",
        "machine": harness.machine() | {"gpu": torch.cuda.get_device_name() if device.type == "cuda" else None},
        "versions": harness.versions(["torch", "triton", "numpy"]),
        **harness.commit(),
        "settings": {"dim": args.dim, "embed_dim": args.embed_dim, "threads": args.threads, "repeats": args.repeats},
        "dtype": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "dropout": DROPOUT,
        "implementations": str(cfkernels.explain(device)).splitlines(),
        "rows": rows,
    }


def print_row(row: dict[str, Any]) -> None:
    """One line for a person, on stderr."""
    peaks = {name: f"{peak / 2**30:.2f} GiB" if peak else "n/a" for name, peak in row.get("peak_bytes", {}).items()}
    seconds = {name: round(values["median"], 4) for name, values in row["seconds"].items()}
    print(f"{row['bag']:<8} dropout {row['dropout']:<13} {seconds} {row['times_faster']['median']:.2f} times faster, "
          f"peak {peaks}, others used {row['others_cores']['median']:.1f} cores", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
