"""Floating-point operations of whatever runs in a block, counted from shapes: real tensors or fake ones.

Counted are products of matrices and convolutions, 2 for a multiplication and its addition: what PyTorch's own formulas
(`torch.utils.flop_counter`) count, and here also the ops of cfkernels, attention on a CPU, products with one vector,
and the backward of grouped convolutions, which PyTorch counts as if every channel met every other. Element-wise work,
sums, sorting and gathering are not counted.

    attention             4 N M H dh forwards; backwards 5 products of that half, scores made again: 10 N M H dh
    convolution           2 x outputs x numbers in one window; backwards as much for its input, and for its weights

A convolution's zeros around the grid count as numbers. All implementations of an op count the same, also where a
kernel makes scores twice. What is computed again in the backward (`torch.utils.checkpoint`) counts again.

Legend: N queries, M keys of one bag, H heads, dh width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_TAPS: Final = 49
"""The windows 7 x 7, 5 x 5, 3 x 3 and 1 x 1 of cfkernels are merged into one of 7 x 7."""


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Floating-point operations of its block, in `total`; enter it after a `FakeTensorMode`, not before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        ours = FORMULAS.get(func._schema.name)
        if ours is not None:
            self.total += ours(*args)
        elif func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        return result


def _attention(q: Tensor, *others: Any) -> int:
    """Two products of a bag's queries and keys; the lengths come before the threshold."""
    return 4 * _pairs(*others[-3:-1]) * q.shape[1] * q.shape[2]


def _attention_backward(grad: Tensor, *others: Any) -> int:
    return 10 * _pairs(*others[-3:-1]) * grad.shape[1] * grad.shape[2]


def _column_sums(q: Tensor, k: Tensor, lse: Tensor, q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> int:
    return 2 * _pairs(q_lengths, kv_lengths) * q.shape[1] * q.shape[2]


def _pairs(q_lengths: Sequence[int], kv_lengths: Sequence[int]) -> int:
    return sum(n * m for n, m in zip(q_lengths, kv_lengths, strict=True))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> int:
    """[..., H, N, dh] and [..., H, M, dh]."""
    return 4 * q.numel() * k.shape[-2]


def _sdpa_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> int:
    return 10 * q.numel() * k.shape[-2]


def _ppeg(x: Tensor, *others: Any) -> int:
    """Windows of one channel; the grids come before the prefix."""
    return 2 * _TAPS * _places(others[-2]) * x.shape[1]


def _ppeg_backward(grad: Tensor, *others: Any) -> int:
    return 2 * _ppeg(grad, *others)


def _grouped_window_conv(x: Tensor, *others: Any) -> int:
    """Half as many outputs as x is wide, each of windows of two channels."""
    return 2 * _TAPS * _places(others[-1]) * x.shape[1]


def _grouped_window_conv_backward(grad: Tensor, x: Tensor, *others: Any) -> int:
    return 2 * _grouped_window_conv(x, *others)


def _places(grids: Sequence[int]) -> int:
    return sum(side * side for side in grids)


def _depthwise(grid: Tensor, weight: Tensor, bias: Tensor) -> int:
    """[H, W, D] and [D, 1, k, k]. Its gradient is made of convolutions that are seen by themselves."""
    return 2 * grid.numel() * weight[0].numel()


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *others: Any) -> int:
    """As much as the forward for each wanted gradient, of input and weight, whatever the groups."""
    transposed, wanted = others[4], others[7]
    each_place = x if transposed else grad
    n_wanted = int(wanted[0]) + int(wanted[1])
    return 2 * n_wanted * each_place.shape[0] * math.prod(each_place.shape[2:]) * weight.numel()


def _by_vector(*factors: Tensor) -> int:
    """A vector, or a matrix, times a vector; what is added to it comes first."""
    return 2 * factors[-2].numel()


FORMULAS: Final[Mapping[str, Callable[..., int]]] = {
    "cfkernels::attention": _attention,
    "cfkernels::attention_backward": _attention_backward,
    "cfkernels::attention_blocked": _attention,
    "cfkernels::attention_blocked_backward": _attention_backward,
    "cfkernels::attention_column_sums": _column_sums,
    "cfkernels::ppeg": _ppeg,
    "cfkernels::ppeg_backward": _ppeg_backward,
    "cfkernels::grouped_window_conv": _grouped_window_conv,
    "cfkernels::grouped_window_conv_backward": _grouped_window_conv_backward,
    "cfkernels::depthwise": _depthwise,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _sdpa,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward,
    "aten::convolution_backward": _convolution_backward,
    "aten::mv": _by_vector,
    "aten::dot": _by_vector,
    "aten::addmv": _by_vector,
}
"""Operations by the name of the op, from its arguments; in place of PyTorch's formulas, or beside them."""
