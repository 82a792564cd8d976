"""The models by name: scales, options and their defaults, sources. Loads no torch.

`cftrain models`, the validation of configurations and `cftrain.models.build` all read this table.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from cftrain.errors import ConfigError, UnknownModelError

VARIANTS = ("released", "text")


@dataclass(frozen=True)
class CrossFusionConfig:
    """Options of CrossFusion and its ablations; the defaults are the published settings."""

    embed_dim: int = 512
    """Width of every token, a multiple of n_heads and of 2."""
    n_heads: int = 4
    """Attention heads."""
    n_layers: int = 1
    """Blocks before, and as many after, each position encoding."""
    dropout: float = 0.3
    """In the feed-forward layers, and of whole channels in the Conv Processor."""
    attention_dropout: float = 0.2
    """Of self-attention probabilities, in training only. Cross-attention has none."""
    variant: str = "released"
    """released: residuals carry the normalised value, as the authors' code does; text: the block's input, as
    the paper writes."""
    n_bins: int = 4
    """Intervals of time."""

    def __post_init__(self) -> None:
        _check_positive(self, "embed_dim", "n_heads", "n_layers", "n_bins")
        _check_rate(self, "dropout", "attention_dropout")
        if self.embed_dim % self.n_heads or self.embed_dim % 2:
            found = f"embed_dim={self.embed_dim}, n_heads={self.n_heads}"
            raise ConfigError(f"crossfusion: embed_dim must be a multiple of n_heads and of 2, got {found}")
        if self.variant not in VARIANTS:
            raise ConfigError(f"crossfusion: variant must be {' or '.join(VARIANTS)}, got {self.variant!r}")


@dataclass(frozen=True)
class ABMILConfig:
    """Options of gated attention pooling; the defaults are those of CrossFusion's comparison."""

    scale: int = 20
    """The one scale it looks at."""
    hidden_dim: int = 512
    """Width of a projected patch."""
    attention_dim: int = 256
    """Width of the gated attention."""
    dropout: float = 0.0
    """After the projection and in both gates; 0.25 is usual elsewhere."""
    n_bins: int = 4
    """Intervals of time."""

    def __post_init__(self) -> None:
        _check_positive(self, "scale", "hidden_dim", "attention_dim", "n_bins")
        _check_rate(self, "dropout")


Options: TypeAlias = CrossFusionConfig | ABMILConfig


@dataclass(frozen=True)
class ModelInfo:
    """What one can know of a model before building it."""

    name: str
    """What `--model` and `build` call it."""
    scales: tuple[int, ...]
    """The scales it reads with default options."""
    reference: str
    """The paper, and the code it was checked against."""
    summary: str
    """One line."""
    options: type[Options]
    """A frozen dataclass; its fields are the options of `build`."""
    maps: Mapping[str, str]
    """Name to meaning, one sentence: what `SurvivalModel.patch_maps` returns."""


_SOURCE_MAP = (
    "Attention that a {} patch receives in the last block of the source Pad-Transformer, mean over queries and heads."
)
_FUSED_MAP = (
    "Attention that a {} patch's place receives from the class token in the last block of the final transformer, mean "
    "over heads."
)
_CROSS_MAP = "Attention that a {} patch receives from the 10x patches in cross-attention, mean over queries and heads."
_THREE_SCALE_MAPS = {
    "coarse-cross": _CROSS_MAP.format("5x"),
    "fine-cross": _CROSS_MAP.format("20x"),
    "source": _SOURCE_MAP.format("10x"),
    "fused": _FUSED_MAP.format("10x"),
}


MODELS: Mapping[str, ModelInfo] = {
    model.name: model
    for model in (
        ModelInfo(
            name="abmil",
            scales=(20,),
            reference="Ilse et al. 2018, arXiv:1802.04712; AMIL of RustinS/CrossFusion",
            summary="One scale; patches weighted by gated attention and averaged.",
            options=ABMILConfig,
            maps={"attention": "Weight of a patch in the mean that represents the slide (softmax over its patches)."},
        ),
        ModelInfo(
            name="crossfusion",
            scales=(5, 10, 20),
            reference="CrossFusion, MIDL 2026, arXiv:2503.02064; RustinS/CrossFusion @ df5473d",
            summary="Three scales; 10x patches attend to 5x and 20x, then transformers and convolutions.",
            options=CrossFusionConfig,
            maps=_THREE_SCALE_MAPS,
        ),
        ModelInfo(
            name="crossfusion-concat",
            scales=(5, 10, 20),
            reference="CrossFusion, ablation w/o CP; CrossFusionConcat of RustinS/CrossFusion @ df5473d",
            summary="Ablation: the three maps concatenated in place of the Conv Processor.",
            options=CrossFusionConfig,
            maps=_THREE_SCALE_MAPS,
        ),
        ModelInfo(
            name="crossfusion-single",
            scales=(20,),
            reference="CrossFusion, ablation w/o F&C; CrossFusionSingle of RustinS/CrossFusion @ df5473d",
            summary="Ablation: one scale, 20x, through the same transformers; the most expensive of the three.",
            options=CrossFusionConfig,
            maps={"source": _SOURCE_MAP.format("20x"), "fused": _FUSED_MAP.format("20x")},
        ),
    )
}


def model_info(name: str) -> ModelInfo:
    """Look a model up.

    Raises
    ------
    UnknownModelError
        Lists near names, and all of them.
    """
    if name not in MODELS:
        raise UnknownModelError(f"no model {name!r}.{_suggest(name, MODELS)} Models: {', '.join(sorted(MODELS))}")
    return MODELS[name]


def model_options(name: str, options: Mapping[str, object]) -> Options:
    """Check a model's options and complete them with its defaults.

    Raises
    ------
    UnknownModelError
        No model of this name.
    ConfigError
        An option is unknown (near names are listed), of the wrong type, or outside its range.
    """
    info = model_info(name)
    defaults = {field.name: field.default for field in dataclasses.fields(info.options)}
    values: dict[str, Any] = {}
    for option, value in options.items():
        if option not in defaults:
            known = ", ".join(sorted(defaults))
            raise ConfigError(f"{name}: no option {option!r}.{_suggest(option, defaults)} Options: {known}")
        values[option] = _converted(name, option, value, type(defaults[option]))
    return info.options(**values)


def _converted(name: str, option: str, value: object, wanted: type) -> object:
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ConfigError(f"{name}: {option} must be {wanted.__name__}, got {value!r}")
    return value


def _suggest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _check_positive(options: object, *names: str) -> None:
    for name in names:
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(options, name)}")


def _check_rate(options: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(options, name)}")
