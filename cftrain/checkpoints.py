"""Models and checkpoints in files: safetensors that say what they are; released state dicts read without running code.

Everything is written aside and renamed; nothing is ever unpickled into objects.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cftrain.errors import RunError, TrainError, WeightsError
from cftrain.models import SurvivalModel, build
from cftrain.models.released import released_model


def save_weights(model: SurvivalModel, path: Path, **about: str) -> None:
    """Write the model's weights with what `load_model` needs; `about` goes into the file's metadata too."""
    temporary = path.with_name(f".{path.name}")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    built = {
        "model": model.name,
        "feature_dim": str(model.feature_dim),
        "options": json.dumps(dataclasses.asdict(model.options)),
    }
    save_file(weights, temporary, metadata={**built, **about})
    temporary.replace(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: str) -> None:
    """Write tensors and a text as safetensors: flushed to the disk, then renamed, so that `path` is whole or absent."""
    temporary = path.with_name(f".{path.name}")
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(held, temporary, metadata={"state": state})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush_folder(path.parent)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """What `write_tensors` wrote.

    Raises
    ------
    RunError
        The file is no safetensors file, or has no such text.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        return load_file(path), about["state"]
    except (SafetensorError, OSError, KeyError) as error:
        message = f"{path}: not a readable checkpoint ({error}); remove it to train the fold from its start"
        raise RunError(message) from error


def _flush_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load_model(path: Path) -> SurvivalModel:
    """Build the model of a file that `save_weights` wrote, on the CPU, in evaluation mode.

    Raises
    ------
    WeightsError
        The file is no safetensors file, does not say which model it is, or its tensors are not that model's.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors: {error}") from error
    if not {"model", "feature_dim", "options"} <= about.keys():
        message = f"{path}: its metadata does not say which model it is; released weights: `cftrain import-weights`"
        raise WeightsError(message)
    model = build(about["model"], int(about["feature_dim"]), **json.loads(about["options"]))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise WeightsError(f"{path}: {error}") from error
    return model.eval()


def load_released(path: Path, *, n_heads: int = 4) -> SurvivalModel:
    """Read a state dict of the released code (RustinS/CrossFusion) into a model of ours.

    Parameters
    ----------
    path
        A `.pt` file of tensors by name, alone or under "state_dict" or "model_state_dict", or safetensors.
    n_heads
        Of CrossFusion, whose tensors do not tell; 4 in all published models.

    Raises
    ------
    WeightsError
        The file cannot be read as tensors alone, or its tensors are those of no model that we know.
    """
    state = _state(path)
    try:
        return released_model(state, n_heads=n_heads)
    except TrainError as error:
        raise WeightsError(f"{path}: {error}") from error


def _state(path: Path) -> Mapping[str, Tensor]:
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # the bytes of a broken or foreign pickle lead anywhere
        reason = str(error).strip().partition("\n")[0]
        message = f"{path}: cannot be read as a state dict of tensors, and other objects are never loaded: {reason}"
        raise WeightsError(message) from error
    for wrapper in ("state_dict", "model_state_dict"):
        if isinstance(found, dict) and wrapper in found:
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{path}: holds a {type(found).__name__}, not tensors by name; save model.state_dict()")
    return found
