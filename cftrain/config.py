"""What a run is told: frozen dataclasses, TOML in, resolved TOML out. Loads no torch.

A setting comes from, last wins: the defaults below, a preset, a TOML file, flags, `--set key=value`.
Unknown keys are refused with near names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from cftrain.cache import parse_cache
from cftrain.errors import ConfigError
from cftrain.zoo import MODELS, Extra, model_info, model_options, scales_of

ModelOption = str | int | float | bool
RECOMMENDED = "recommended"
"""The preset that is taken where none is named: the defaults below."""


@dataclass(frozen=True)
class DataConfig:
    """Which slides, from which features, in which folds, and how they are read."""

    cohort: str = ""
    """Cohort in the store (with `where`, or tars of one cohort: may be empty)."""
    where: str = ""
    """SQL condition on patients and slides, e.g. "age > 40": only slides that meet it. Empty: all."""
    shards: str = ""
    """Tars to read in place of a store, e.g. "path/{000..031}.tar"; empty: the store."""
    encoder: str = ""
    """Encoder of the features; empty: the cohort's only one."""
    splits: str = ""
    """Split set in the store; empty: the cohort's only one, or made (folds, seed) where it has none."""
    folds: int = 5
    """Folds to make where the store has no splits."""
    unit: Literal["slide", "patient"] = "slide"
    """One training example: a slide, or all slides of a patient as one bag."""
    readers: int = 2
    """Threads that read slides ahead."""
    ahead: int = 16
    """Slides read ahead, at most."""
    ahead_mib: int = 1024
    """Memory for slides read ahead, at most; a larger slide gets memory of its own."""
    order: Literal["shuffled", "shard", "independent"] = "shuffled"
    """shuffled: all folds visit the cohort in one random order per epoch, so that one reading serves them all.
    shard: the same, shard after shard (kind to the page cache; the default with `shards`). independent: every
    fold in an order of its own, each draw apart, as the paper's code does; such folds are read one by one."""
    order_seed: int = -1
    """Of that order, and of made splits; -1: train.seed."""
    cache: str = "auto"
    """Bags kept between epochs and folds: auto, off, ram[:SIZE] or gpu[:SIZE], e.g. ram:8GB."""


@dataclass(frozen=True)
class BinsConfig:
    """The intervals of discrete time."""

    count: int = 4
    """Number of bins: quantiles of the times of observed deaths."""
    fitted_on: Literal["train", "cohort"] = "train"
    """Whose deaths: those of the training fold, or (the paper's code) of all slides, val included."""


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. Defaults are the paper's, but for a shorter schedule that ends at a fixed epoch."""

    epochs: int = 20
    """Passes over the training fold."""
    learning_rate: float = 1e-4
    """Of Adam, at the start."""
    weight_decay: float = 4e-6
    """Of Adam (L2)."""
    accumulate: int = 32
    """Slides in one optimiser step."""
    batch_patches: int = 0
    """Patches (all scales) in one forward pass: small slides of a step are packed up to this. 0: as many as the
    device has memory for, at most 8,192 on a CPU and 65,536 on a GPU; the number found is written to config.toml."""
    loss: Literal["nll", "ce", "cox"] = "nll"
    """Of discrete-time hazards: negative log-likelihood, or its cross-entropy variant; cox: partial likelihood over
    the slides of a step, which ranks patients and predicts no survival times; weighted draws change who is at risk."""
    cosine_epochs: int = 0
    """Half period of the cosine schedule; 0: all epochs, falling once. The paper: 10, falling and rising."""
    final_learning_rate: float = 0.1
    """The schedule's lowest point, as a fraction of learning_rate."""
    alpha: float = 0.0
    """How far censored slides are discounted in the loss; the paper's code trains with 0.2."""
    sampling: Literal["weighted", "uniform"] = "uniform"
    """Visit each slide once per epoch, or draw by inverse frequency of (bin, event) with replacement as the paper's
    code does, which shows half to two thirds of the slides and trains for another population."""
    select_from: int = 6
    """First epoch that may be called the best one (the paper's warm-up of 5 epochs)."""
    patience: int = 0
    """Stop when the best epoch lies this many epochs back; 0: never, so the last epoch is known beforehand."""
    nested: float = 0.0
    """Share of a fold's training patients, at most 0.5, that an inner model of the fold is validated on in place of
    the reported part: its best epoch is one more rule beside the others. Such folds train twice, and patience ends
    the other rules but not the training. 0: no inner models."""
    on_nan: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is NaN or Inf: stop the run, or leave that step out; the slide is named either way."""
    checkpoint_minutes: float = 5.0
    """Time between checkpoints; 0: after every step."""
    seed: int = 7
    """Of weights, dropout and weighted draws."""

    @property
    def first_selectable(self) -> int:
        """The first epoch that may be selected: `select_from`, or the last of a shorter schedule."""
        return min(self.select_from, self.epochs)


@dataclass(frozen=True)
class ModelConfig:
    """The model and its options."""

    name: str = "crossfusion"
    """One of `cftrain models`."""
    options: Mapping[str, ModelOption] = field(default_factory=dict)
    """Fields of the model's options, see `cftrain models NAME`."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers, but the data themselves."""

    preset: str = RECOMMENDED
    data: DataConfig = field(default_factory=DataConfig)
    bins: BinsConfig = field(default_factory=BinsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def order_seed(self) -> int:
        """The seed of the order in which slides are visited, and of made splits."""
        return self.train.seed if self.data.order_seed < 0 else self.data.order_seed

    @property
    def n_outputs(self) -> int:
        """Logits of the model: one per time bin, or the one log hazard of a Cox model."""
        return 1 if self.train.loss == "cox" else self.bins.count

    @property
    def has_inner(self) -> bool:
        """Whether every fold has an inner learner: nested validation, and more than one epoch to choose from."""
        return self.train.nested > 0 and self.train.first_selectable < self.train.epochs

    def scales(self) -> tuple[int, ...]:
        """The scales that the model reads."""
        name = self.model.name
        return scales_of(model_info(name), model_options(name, self.model.options))

    def extras(self) -> tuple[Extra, ...]:
        """What the model reads of a slide besides features."""
        return model_options(self.model.name, self.model.options).extras()

    def fit_extras(self) -> tuple[Extra, ...]:
        """What it is fitted on besides that, before its first step."""
        return model_options(self.model.name, self.model.options).fit_extras()


_SECTIONS: Mapping[str, type[Any]] = {"data": DataConfig, "bins": BinsConfig, "train": TrainConfig}
_POSITIVE = {
    "data": ("folds", "readers", "ahead", "ahead_mib"),
    "bins": ("count",),
    "train": ("epochs", "learning_rate", "accumulate", "select_from"),
}
_NOT_NEGATIVE = ("weight_decay", "cosine_epochs", "patience", "seed", "batch_patches", "checkpoint_minutes")
RESUMABLE = ("data.readers", "data.ahead", "data.ahead_mib", "data.cache", "train.on_nan", "train.checkpoint_minutes")
"""Settings that change no number, so that a stopped run may go on with others."""


def presets() -> list[str]:
    """Names of the presets that ship with cftrain, besides the recommended one."""
    files = resources.files("cftrain").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_config(
    *,
    preset: str | None = None,
    file: Path | None = None,
    flags: Mapping[str, str | None] | None = None,
    settings: Iterable[str] = (),
) -> RunConfig:
    """Resolve a configuration.

    Parameters
    ----------
    preset
        One of `presets()`.
    file
        TOML with sections [data], [bins], [train], [model]; may name a preset itself. A section named after a model,
        such as [abmil], holds options of that model alone, before those of [model].
    flags
        Dotted keys to values, None for flags that were not given.
    settings
        `key=value` texts, e.g. "train.epochs=50"; values as in TOML, bare words are strings.

    Raises
    ------
    ConfigError
        An unknown key (near names are listed), a wrong type, a value out of range, no such preset.
    UnknownModelError
        No such model.
    """
    content = _read_toml(file) if file else {}
    named = preset or content.pop("preset", None)
    content.pop("preset", None)
    values: dict[str, Any] = {}
    if named and named != RECOMMENDED:
        values = _flatten(_read_preset(str(named)), f"preset {named}")
    values = _over(values, _flatten(content, str(file)))
    values = _over(values, {key: value for key, value in (flags or {}).items() if value is not None})
    values = _over(values, dict(_parse_setting(text) for text in settings))
    return _build(str(named or RECOMMENDED), values)


def to_toml(config: RunConfig) -> str:
    """The resolved configuration as TOML; `load_config(file=...)` of it gives `config` back."""
    lines = [f"preset = {json.dumps(config.preset)}"]
    for section in _SECTIONS:
        lines += ["", f"[{section}]", *_toml_lines(dataclasses.asdict(getattr(config, section)))]
    options = dataclasses.asdict(model_options(config.model.name, config.model.options))
    options.pop("n_bins")
    lines += ["", "[model]", *_toml_lines({"name": config.model.name, **options})]
    return "\n".join(lines) + "\n"


def differences(one: RunConfig, other: RunConfig) -> list[str]:
    """Keys of the settings in which two configurations differ; the preset's name is none."""
    flat = [_flat(config) for config in (one, other)]
    return [key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)]


def _flat(config: RunConfig) -> dict[str, Any]:
    found = _flatten({section: dataclasses.asdict(getattr(config, section)) for section in _SECTIONS}, "")
    options = dataclasses.asdict(model_options(config.model.name, config.model.options))
    options.pop("n_bins")
    return found | {f"model.{key}": value for key, value in {"name": config.model.name, **options}.items()}


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {json.dumps(value)}" for key, value in values.items()]


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        message = f"{file}: not a readable TOML file ({error})"
        raise ConfigError(message) from error


def _read_preset(name: str) -> dict[str, Any]:
    if name not in presets():
        message = f"no preset {name!r}; presets: {', '.join([RECOMMENDED, *presets()])}"
        raise ConfigError(message)
    return tomllib.loads(resources.files("cftrain").joinpath(f"presets/{name}.toml").read_text(encoding="utf-8"))


def _flatten(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for section, values in content.items():
        if not isinstance(values, dict):
            message = f"{where}: {section!r} stands outside the sections {', '.join([*_SECTIONS, 'model'])}"
            raise ConfigError(message)
        flat |= {f"{section}.{key}": value for key, value in values.items()}
    return flat


def _over(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Both, the later one winning: its `model.x` also over an earlier `abmil.x`."""
    set_again = {name for section, _, name in (key.partition(".") for key in later) if section == "model"}

    def holds(key: str) -> bool:
        section, _, name = key.partition(".")
        return section not in MODELS or name not in set_again

    return {**{key: value for key, value in earlier.items() if holds(key)}, **later}


def _parse_setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        message = f"--set {text!r}: write it as key=value, e.g. --set train.epochs=50"
        raise ConfigError(message)
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _build(preset: str, values: Mapping[str, Any]) -> RunConfig:
    parts: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    options: dict[str, Any] = {}
    of_models: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        if section == "model":
            options[name] = value
        elif section in MODELS:
            of_models.setdefault(section, {})[name] = value
        elif section in parts and name in _fields(_SECTIONS[section]):
            parts[section][name] = _checked(key, value, get_type_hints(_SECTIONS[section])[name])
        else:
            _refuse(key)
    if parts["data"].get("shards"):
        parts["data"].setdefault("order", "shard")
    built = {section: kind(**parts[section]) for section, kind in _SECTIONS.items()}
    _check_ranges(built)
    for name, own in of_models.items():
        model_options(name, own)  # also of models that are not asked for now: a wrong name never goes unnoticed
    name = str(options.pop("name", ModelConfig.name))
    model = ModelConfig(name, {**options, **of_models.get(name, {})})
    if "n_bins" in set(options).union(*of_models.values()):
        message = "model.n_bins follows bins.count; set that"
        raise ConfigError(message)
    model_options(model.name, model.options)
    if not MODELS[model.name].by_gradient:
        built["train"] = dataclasses.replace(built["train"], epochs=1)  # there are none: it is fitted, and measured
    return RunConfig(preset=preset, model=model, **built)


def _fields(kind: type[Any]) -> list[str]:
    return [item.name for item in dataclasses.fields(kind)]


def _refuse(key: str) -> None:
    known = [f"{section}.{name}" for section, kind in _SECTIONS.items() for name in _fields(kind)] + ["model.name"]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    near += [name for name in known if name.split(".")[1] == key.split(".")[-1] and name not in near]
    hint = f"did you mean {' or '.join(near)}?" if near else f"keys: {', '.join(known)}"
    message = f"unknown setting {key!r}; {hint}"
    raise ConfigError(message)


def _checked(key: str, value: Any, wanted: Any) -> Any:
    if get_origin(wanted) is Literal:
        if value not in get_args(wanted):
            message = f"{key} must be one of {', '.join(get_args(wanted))}, got {value!r}"
            raise ConfigError(message)
        return value
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        message = f"{key} must be {wanted.__name__}, got {value!r}"
        raise ConfigError(message)
    return value


def _check_ranges(built: Mapping[str, Any]) -> None:
    for section, names in _POSITIVE.items():
        for name in names:
            if getattr(built[section], name) <= 0:
                message = f"{section}.{name} must be above 0, got {getattr(built[section], name)}"
                raise ConfigError(message)
    if built["bins"].count < 2 or built["data"].folds < 2:
        message = "bins.count and data.folds must be at least 2"
        raise ConfigError(message)
    parse_cache(built["data"].cache)
    if built["data"].order_seed < -1:
        message = f"data.order_seed must be -1 (train.seed) or at least 0, got {built['data'].order_seed}"
        raise ConfigError(message)
    if built["data"].order == "independent" and built["data"].shards:
        message = "data.order must be shard or shuffled for tars: independent draws would jump about in them"
        raise ConfigError(message)
    train: TrainConfig = built["train"]
    negative = [n for n in _NOT_NEGATIVE if getattr(train, n) < 0]
    if negative:
        message = f"train.{negative[0]} must not be negative, got {getattr(train, negative[0])}"
        raise ConfigError(message)
    if not (0 <= train.alpha <= 1 and 0 <= train.final_learning_rate <= 1):
        message = "train.alpha and train.final_learning_rate must lie between 0 and 1"
        raise ConfigError(message)
    if not 0 <= train.nested <= 0.5:
        message = f"train.nested must lie between 0 and 0.5, got {train.nested}"
        raise ConfigError(message)
