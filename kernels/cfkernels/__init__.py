"""The operators where survival models on ragged bags spend their time, each with its plain definition.

Bags are packed: the rows of all bags lie one after the other in one tensor, and a tuple of row counts
(or of grid sides) says where each bag ends.
"""

from cfkernels.attention import attention
from cfkernels.dispatch import using
from cfkernels.errors import KernelError, RateError, ShapeError, UnavailableError
from cfkernels.gelu_dropout import gelu_dropout
from cfkernels.grouped_window_conv import grouped_window_conv
from cfkernels.ppeg import ppeg

__all__ = [
    "KernelError",
    "RateError",
    "ShapeError",
    "UnavailableError",
    "attention",
    "gelu_dropout",
    "grouped_window_conv",
    "ppeg",
    "using",
]
