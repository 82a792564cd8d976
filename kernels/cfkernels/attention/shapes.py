"""What attention and its column sums refuse."""

from __future__ import annotations

from cfkernels.errors import ShapeError


def check_lengths(n_queries: int, n_keys: int, q_lengths: tuple[int, ...], kv_lengths: tuple[int, ...]) -> None:
    """Refuse lengths that are not those of the same bags, or do not add up.

    Raises
    ------
    ShapeError
        Names the lengths and the rows.
    """
    if len(q_lengths) != len(kv_lengths):
        raise ShapeError(f"q_lengths names {len(q_lengths)} bags, kv_lengths {len(kv_lengths)}")
    for name, rows, lengths in (("q", n_queries, q_lengths), ("kv", n_keys, kv_lengths)):
        if sum(lengths) != rows or min(lengths, default=0) < 1:
            raise ShapeError(f"{name}_lengths {lengths} must be positive and add up to {rows} rows")


def check_width(head_dim: int) -> str | None:
    """Why the kernels cannot take heads of this width; None where they can."""
    if 16 <= head_dim <= 128 and head_dim % 8 == 0:
        return None
    return f"head_dim {head_dim} has no kernel; multiples of 8 from 16 to 128 have"
