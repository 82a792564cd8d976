"""Weights as safetensors, written aside and renamed; nothing is ever unpickled."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file

from cftrain.models import SurvivalModel


def save_weights(model: SurvivalModel, path: Path, **about: str) -> None:
    """Write the model's weights; `about` goes into the file's metadata."""
    temporary = path.with_name(f".{path.name}")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, temporary, metadata={"model": model.name, "feature_dim": str(model.feature_dim), **about})
    temporary.replace(path)
