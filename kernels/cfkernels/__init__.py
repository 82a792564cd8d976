"""The operators where survival models on ragged bags spend their time, each with its plain definition.

Bags are packed: the rows of all bags lie one after the other in one tensor, and a tuple of row counts
(or of grid sides) says where each bag ends.
"""

from cfkernels.attention import attention, attention_and_lse
from cfkernels.attention_column_sums import attention_column_sums
from cfkernels.dispatch import using
from cfkernels.dropout_add import dropout_add
from cfkernels.errors import KernelError, RateError, ShapeError, UnavailableError
from cfkernels.explain import Explanation, explain
from cfkernels.gelu_dropout import gelu_dropout
from cfkernels.grouped_window_conv import grouped_window_conv
from cfkernels.layer_norm import layer_norm
from cfkernels.mix_layer_norms import mix_layer_norms
from cfkernels.ppeg import ppeg

__all__ = [
    "Explanation",
    "KernelError",
    "RateError",
    "ShapeError",
    "UnavailableError",
    "attention",
    "attention_and_lse",
    "attention_column_sums",
    "dropout_add",
    "explain",
    "gelu_dropout",
    "grouped_window_conv",
    "layer_norm",
    "mix_layer_norms",
    "ppeg",
    "using",
]
