"""Where a run keeps its bags between epochs: on the GPU, in RAM, or nowhere. Decided from numbers alone; no torch.

The sizes are those of decoded bags as they are stored (int8 stays int8). What does not fit on the
GPU goes to RAM, what does not fit there is read again every epoch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from cftrain.errors import ConfigError

RAM_SHARE: Final = 0.6
"""Of the free RAM; the rest is for models, the page cache and everybody else."""
GPU_SHARE: Final = 0.5
"""Of the free GPU memory; the rest is for weights, activations and gradients."""

_UNITS: Final = {
    f"{letter}{binary}B": (1024 if binary else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for binary in ("", "i")
}
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", re.IGNORECASE)
_KINDS: Final = ("auto", "off", "ram", "gpu")


@dataclass(frozen=True)
class CacheSetting:
    """What `--cache` says: a kind, and at most how many bytes (None: as the free memory allows)."""

    kind: str
    limit: int | None = None


@dataclass(frozen=True)
class CachePlan:
    """Bytes of bags that one process keeps on its GPU and in RAM, and why, in one sentence."""

    gpu_bytes: int = 0
    ram_bytes: int = 0
    why: str = ""


NO_CACHE: Final = CachePlan()


def parse_size(text: str, setting: str) -> int:
    """Bytes of "8GB" (10^9), "512MiB" (2^20), "1.5 GB"; `setting` is named where it is none.

    Raises
    ------
    ConfigError
        No number, no unit, or no byte.
    """
    found = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    nbytes = int(float(found[1]) * units[found[2].lower()]) if found else 0
    if nbytes < 1:
        message = f"{setting}: {text!r} is no size; write it as 8GB or 512MiB ({', '.join(_UNITS)})"
        raise ConfigError(message)
    return nbytes


def parse_cache(text: str) -> CacheSetting:
    """Read "auto", "off", "ram", "ram:8GB", "gpu" or "gpu:20GB".

    Raises
    ------
    ConfigError
        Anything else; the message says what may stand there.
    """
    kind, colon, size = text.strip().partition(":")
    if kind not in _KINDS or (colon and kind in ("auto", "off")):
        message = f"data.cache must be auto, off, ram[:SIZE] or gpu[:SIZE], got {text!r}"
        raise ConfigError(message)
    return CacheSetting(kind, parse_size(size, f"data.cache {text}") if colon else None)


def plan_cache(setting: str, *, cohort_bytes: int, ram_free: int, gpu_free: int | None, jobs: int = 1) -> CachePlan:
    """Decide what each of `jobs` processes keeps of the cohort between epochs.

    Parameters
    ----------
    setting
        `data.cache`. A SIZE is for all jobs together, and is honoured or refused, never made smaller.
    cohort_bytes
        Decoded bags of the run's slides and scales, as stored.
    ram_free, gpu_free
        Bytes free now; None for a run on the CPU.
    jobs
        Processes that share the memory, each with bags of its own.

    Raises
    ------
    ConfigError
        A GPU cache without a GPU, a SIZE beyond what is free, or a setting that says nothing.
    """
    asked = parse_cache(setting)
    if asked.kind == "off":
        return CachePlan(why=f"cache: off, {size_text(cohort_bytes)} of bags are read again every epoch")
    if asked.kind == "gpu" and gpu_free is None:
        message = f"--cache {setting}: this run is on the CPU; use --cache ram, or --device cuda"
        raise ConfigError(message)
    gpu = ram = 0
    if gpu_free is not None and asked.kind != "ram":
        gpu = _room(asked, "gpu", cohort_bytes, gpu_free, GPU_SHARE, jobs)
    if gpu < cohort_bytes:
        ram = _room(asked, "ram", cohort_bytes - gpu, ram_free, RAM_SHARE, jobs)
    return CachePlan(gpu, ram, _why(cohort_bytes, gpu, ram, ram_free, gpu_free, jobs))


def _room(asked: CacheSetting, kind: str, wanted: int, free: int, share: float, jobs: int) -> int:
    """Bytes for one job: what it wants, as far as there is room."""
    if asked.kind != kind or asked.limit is None:
        return min(wanted, int(free * share) // jobs)
    taken = min(wanted, asked.limit // jobs)
    if taken * jobs > free:
        message = (
            f"--cache {kind}: {size_text(asked.limit)} do not fit, {size_text(free)} are free; "
            f"name less, or leave the size out"
        )
        raise ConfigError(message)
    return taken


def _why(cohort_bytes: int, gpu: int, ram: int, ram_free: int, gpu_free: int | None, jobs: int) -> str:
    free = f"{size_text(ram_free)} RAM free"
    if gpu_free is not None:
        free = f"{size_text(gpu_free)} GPU and {free}"
    parts = {"on the GPU": gpu, "in RAM": ram, "read again every epoch": cohort_bytes - gpu - ram}
    held = [(nbytes, place) for place, nbytes in parts.items() if nbytes]
    if len(held) == 1:
        kept = "all " + held[0][1] if held[0][1].startswith("read") else "all kept " + held[0][1]
    else:
        kept = ", ".join(f"{size_text(nbytes)} {place}" for nbytes, place in held)
    each = f", in each of {jobs} jobs" if jobs > 1 else ""
    return f"cache: {size_text(cohort_bytes)} of bags, {free}: {kept}{each}"


def size_text(nbytes: int) -> str:
    """Bytes for people: "12.1 GB"; a number of 100 or more without decimals."""
    value, unit = float(nbytes), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.95 else f"{value:.1f} {unit}"
