"""Between float32 and float16: by NumPy, or 15 to 30 times as fast by torch, where it is loaded.

Both round to nearest, ties to even, so the results are the same. torch takes a second to import,
which pays from about a gigabyte on; so who has that much to convert asks for it.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

WORTH_TORCH: Final = 1 << 30
"""Bytes of float32 from which on importing torch saves time."""


def prefer_torch() -> None:
    """Load torch, for one thread: whoever converts that much has a process per core."""
    import torch  # seconds and memory that small ingests do not pay

    torch.set_num_threads(1)


def convert_into(source: NDArray[Any], out: NDArray[Any]) -> None:
    """Write `source` into `out`, float32 into float16 or the other way; other dtypes by NumPy. Both C-contiguous."""
    torch = sys.modules.get("torch")
    if torch is not None and {source.dtype, out.dtype} == {np.dtype(np.float32), np.dtype(np.float16)}:
        readable = source if source.flags.writeable else source.copy()  # torch takes no read-only memory
        torch.from_numpy(out).copy_(torch.from_numpy(readable))
        return
    with np.errstate(under="ignore", over="ignore"):
        np.copyto(out, source, casting="same_kind")


def widened(block: NDArray[Any]) -> NDArray[Any]:
    """float16 as float32, for which NumPy has fast loops; anything else as it is."""
    if block.dtype != np.float16:
        return block
    wide = np.empty(block.shape, np.float32)
    convert_into(block, wide)
    return wide
