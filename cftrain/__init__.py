"""Survival models on whole-slide bags. `import cftrain` loads no torch: commands import what they need."""

__version__ = "0.1.0"
