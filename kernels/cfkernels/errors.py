"""Everything cfkernels raises on purpose.

    KernelError
    └── ShapeError     tensors and lengths that do not fit together (also ValueError)

Messages say what was found and what was expected, in one line.
"""

from __future__ import annotations


class KernelError(Exception):
    """Base of every error that cfkernels raises on purpose."""


class ShapeError(KernelError, ValueError):
    """Tensors, lengths or grid sizes that do not fit together."""
