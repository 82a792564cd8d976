"""Everything cfkernels raises on purpose.

    KernelError
    ├── ShapeError            tensors and lengths that do not fit together (also ValueError)
    ├── RateError             a dropout rate that cannot be (also ValueError)
    └── UnavailableError      a forced implementation that cannot run here

Messages say what was found and what was expected, in one line.
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of every error that cfkernels raises on purpose."""


class ShapeError(KernelError, ValueError):
    """Tensors, lengths or grid sizes that do not fit together."""


class RateError(KernelError, ValueError):
    """A dropout rate outside [0, 1), or too small to act in 256ths."""


class UnavailableError(KernelError):
    """An implementation named by `using` that cannot run on these inputs, or that no op has."""
