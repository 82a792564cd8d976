"""Mends Triton's interpreter where it is wrong, for tests: bfloat16, masks made of one truth value, loop bounds.

The interpreter keeps bfloat16 as its bits in uint16. Its dot multiplies those bits (triton-lang/triton#11584), its
casts from float32 cut instead of rounding to nearest even, and a scalar condition spread over a block is no mask.
Triton 3.6 cannot use a loaded number in `range`: numpy from 2.4 on makes no int of an array with one dimension.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_tensor = interpreter._patch_lang_tensor
_dot, _cast, _splat = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_splat


def _numbers(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def _create_dot(self, a, b, d, *rest):
    if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
        product = np.matmul(_numbers(a), _numbers(b), dtype=d.data.dtype)
        return TensorHandle(product + d.data, d.dtype.scalar)
    return _dot(self, a, b, d, *rest)


def _cast_impl(self, source, destination):
    if source.dtype.scalar != tl.float32 or destination.scalar != tl.bfloat16:
        return _cast(self, source, destination)
    bits = np.asarray(source.data, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _create_splat(self, shape, value):
    if np.asarray(value.data).dtype == np.bool_:
        return TensorHandle(np.full(shape.shape, value.data, dtype=np.bool_), tl.int1)
    return _splat(self, shape, value)


def _patch_lang_tensor(tensor, scope):
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def mend() -> None:
    """Install the repairs, and make the interpreter check its integers for overflow."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_splat = _create_splat
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(debug=True)
