"""The public face of cfkernels."""

import cfkernels


def test_cfkernels_exports_exactly_its_operators_and_errors():
    assert cfkernels.__all__ == [
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
    assert all(callable(getattr(cfkernels, name)) for name in cfkernels.__all__)


def test_shape_errors_can_be_caught_as_kernel_errors_and_as_value_errors():
    assert issubclass(cfkernels.ShapeError, cfkernels.KernelError)
    assert issubclass(cfkernels.ShapeError, ValueError)
