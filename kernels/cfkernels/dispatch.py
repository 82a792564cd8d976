"""Which implementation of an op runs: the first that can, in the op's own order, or the one named by `using`.

Every op lists its candidates for a kind of input, each with the reason why it cannot run there or why it is
preferred; `cfkernels.explain` prints the same lists. Nothing is tried and caught: a kernel that was chosen and
fails, fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from cfkernels.errors import UnavailableError


class Candidate(NamedTuple):
    """One implementation of an op, for one kind of input."""

    name: str
    """What `using` calls it: reference, torch, sdpa, blocked or triton."""
    blocker: str | None
    """Why it cannot run these inputs; None where it can."""
    merit: str
    """Why it is taken where it can."""
    only_named: str | None = None
    """Why it is never taken unless `using` names it; None where it may be."""


_forced: dict[str, str] = {}


@contextmanager
def using(**implementations: str) -> Iterator[None]:
    """Name the implementation of some ops, in this process, for as long as the block runs.

    Example: `with using(attention="triton", ppeg="reference"): ...`. For benchmarks and tests.

    Raises
    ------
    UnavailableError
        At the call of an op that has no such implementation, or whose inputs it cannot take.
    """
    before = dict(_forced)
    _forced.update(implementations)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def choose(op: str, candidates: Sequence[Candidate]) -> Candidate:
    """Take the implementation named by `using`, else the first candidate that nothing blocks.

    Raises
    ------
    UnavailableError
        The named one is unknown or blocked, or all are.
    """
    named = _forced.get(op)
    for candidate in candidates:
        if named is None and (candidate.blocker is None and candidate.only_named is None):
            return candidate
        if candidate.name == named:
            if candidate.blocker is not None:
                raise UnavailableError(f"{op}: {named!r} cannot run here: {candidate.blocker}")
            return candidate
    known = "; ".join(f"{one.name} ({one.blocker or one.only_named or one.merit})" for one in candidates)
    found = "no implementation can run these inputs" if named is None else f"no implementation {named!r}"
    raise UnavailableError(f"{op}: {found}; there are {known}")
