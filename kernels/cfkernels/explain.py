"""What each op would run on a device, and why: the same lists of candidates that the ops choose from."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cfkernels.attention import candidates as attention_candidates
from cfkernels.attention_column_sums import candidates as attention_column_sums_candidates
from cfkernels.dispatch import Candidate, choose
from cfkernels.dropout_add import candidates as dropout_add_candidates
from cfkernels.errors import UnavailableError
from cfkernels.gelu_dropout import candidates as gelu_dropout_candidates
from cfkernels.grouped_window_conv import candidates as grouped_window_conv_candidates
from cfkernels.layer_norm import candidates as layer_norm_candidates
from cfkernels.mix_layer_norms import candidates as mix_layer_norms_candidates
from cfkernels.ppeg import candidates as ppeg_candidates

_WIDTH = 110


class Row(NamedTuple):
    """One op."""

    op: str
    implementation: str
    """What `using` calls it; "none" where the op would raise UnavailableError."""
    why: str
    alternatives: tuple[tuple[str, str], ...]
    """The others, each with the reason why it is not taken."""


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, it is a table."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    dropout: bool
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """One line for each op, and one below it for each alternative; none is longer than 110 characters."""
        lines = [("op", "runs", "because"), ("", "", "")]
        for row in self.rows:
            lines.append((row.op, row.implementation, row.why))
            lines += [("", f"not {name}", reason) for name, reason in row.alternatives]
        first, second = (max(len(line[i]) for line in lines) + 2 for i in range(2))
        kind = f"{str(self.dtype).removeprefix('torch.')}, heads of {self.head_dim}"
        title = f"cfkernels on {self.device}, {kind}, {'with' if self.dropout else 'without'} attention dropout"
        wrapped = [
            textwrap.fill(reason, _WIDTH, initial_indent=f"{op:{first}}{name:{second}}", subsequent_indent=" " * indent)
            for op, name, reason in lines
            for indent in (first + second,)
        ]
        return "\n".join([title, "", *(line.rstrip() for line in wrapped)])


def explain(
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    head_dim: int = 128,
    dropout: bool = True,
) -> Explanation:
    """Say which implementation each op would use for such tensors here, why, and why not the others.

    What `using` names is taken into account.

    Parameters
    ----------
    device
        CUDA where there is a device, else the CPU.
    dtype
        bfloat16 on CUDA, else float32.
    head_dim
        Width of a head, for attention.
    dropout
        Whether attention drops probabilities.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {
        "attention": attention_candidates(device, dtype, head_dim, dropout, False),
        "attention_and_lse": attention_candidates(device, dtype, head_dim, dropout, True),
        "attention_column_sums": attention_column_sums_candidates(device, dtype, head_dim),
        "ppeg": ppeg_candidates(device, dtype),
        "grouped_window_conv": grouped_window_conv_candidates(device, dtype),
        "mix_layer_norms": mix_layer_norms_candidates(device, dtype),
        "layer_norm": layer_norm_candidates(device, dtype),
        "dropout_add": dropout_add_candidates(device, dtype),
        "gelu_dropout": gelu_dropout_candidates(device, dtype),
    }
    rows = tuple(_row(op, candidates) for op, candidates in found.items())
    return Explanation(device, dtype, head_dim, dropout, rows)


def _row(op: str, candidates: Sequence[Candidate]) -> Row:
    try:
        # both forms of attention are one op to `using`
        chosen = choose("attention" if op == "attention_and_lse" else op, candidates)
    except UnavailableError as error:
        return Row(op, "none", str(error), tuple((one.name, _against(one)) for one in candidates))
    others = tuple((one.name, _against(one)) for one in candidates if one.name != chosen.name)
    first = next((one for one in candidates if one.blocker is None and one.only_named is None), None)
    why = chosen.merit if chosen is first else f"named by `using`; {chosen.merit}"
    return Row(op, chosen.name, why, others)


def _against(one: Candidate) -> str:
    return one.blocker or one.only_named or f"not the first that can run: {one.merit}"
