"""How much RAM this process may still take: the machine's, and its control group's (containers, SLURM)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Allowance:
    """What one of several jobs may take of a machine.

    Parameters
    ----------
    ram_bytes
        Of RAM at most; None: what is free.
    gpu_share
        Of a GPU's memory at most, above 0 and up to 1.
    """

    ram_bytes: int | None = None
    gpu_share: float = 1.0

    def of_ram(self, free: int) -> int:
        """Bytes it may take where so many are free."""
        return free if self.ram_bytes is None else min(free, self.ram_bytes)


EVERYTHING = Allowance()


def free_ram(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping: the smallest of MemAvailable and every control group's rest.

    Parameters
    ----------
    root
        Where `proc` and `sys` are; another folder in tests.
    """
    return max(0, min([_available(root / "proc/meminfo"), *_group_rests(root)]))


def _available(meminfo: Path) -> int:
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0


def _group_rests(root: Path) -> list[int]:
    """What each group above this process has left, its reclaimable page cache counted as free."""
    rests = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        rests += [_rest(folder, *names) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return [rest for rest in rests if rest is not None]


def _rest(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    top, now = _read(group / limit).strip(), _read(group / used).strip()
    if not top.isdigit() or not now.isdigit():
        return None  # "max", or a group that this process cannot see
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    return int(top) - int(now) + int(stat.get(reclaimable, 0))


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
