"""Maps of one slide by the models of a run: what they attend to, what moves the risk, and what happens without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from cftrain.errors import ConfigError, NonFiniteError
from cftrain.heatmap.attribution import Attribution, gradient, integrated, risk_of
from cftrain.heatmap.deletion import Deletion, deletions
from cftrain.heatmap.layers import Floats, Layer
from cftrain.heatmap.subject import Subject
from cftrain.models import BagBatch
from cftrain.prediction.trained import Member
from cftrain.zoo import MODELS

GRADIENT: Final = "gradient"
INTEGRATED: Final = "integrated"
ALL: Final = "all"

_IN_SD: Final = "in standard deviations of the risks of the fold's validated slides"
MEANING: Final = {
    GRADIENT: "gradient of the risk times the patch's distance from the slide's mean patch: above 0 raises the risk; "
    + _IN_SD,
    INTEGRATED: "integrated gradients from a slide of mean patches: above 0 raises the risk, all scales add up to its "
    "distance from that slide's; " + _IN_SD,
}
_METHODS: Final[Mapping[str, Callable[..., Attribution]]] = {GRADIENT: gradient, INTEGRATED: integrated}


class Explained(NamedTuple):
    """What `explain` found.

    layers
        The maps, attention first, in the order of the model's.
    facts
        Of each layer by name: plain values for heatmap.json.
    """

    layers: tuple[Layer, ...]
    facts: dict[str, dict[str, Any]]


def choose_maps(model: str, asked: Sequence[str]) -> tuple[str, ...]:
    """The maps to make; "all" is those of the model and the gradient, "integrated" must be named: it takes longer.

    Raises
    ------
    ConfigError
        The model has no such map; lists those that there are.
    """
    own = (*MODELS[model].maps, GRADIENT)
    known = (*own, INTEGRATED)
    wanted = [name for each in asked or (ALL,) for name in (own if each == ALL else (each,))]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        message = f"{model} has no map {unknown[0]!r}; it has {', '.join(known)}, or all"
        raise ConfigError(message)
    return tuple(name for name in known if name in wanted)


def explain(
    members: Sequence[Member], subject: Subject, names: Sequence[str], loss: str, device: torch.device
) -> Explained:
    """Compute maps of a slide, each the mean over the models given, in float32.

    Parameters
    ----------
    names
        As `choose_maps` returns them.
    loss
        What the models were trained with: says what their risk is.

    Raises
    ------
    NonFiniteError
        A model gives NaN or Inf.
    """
    batch = subject.batch.to(device)
    attention = [name for name in names if name in MODELS[members[0].model.name].maps]
    sums: dict[tuple[str, int], Floats] = {}
    elsewhere: dict[str, float] = dict.fromkeys(attention, 0.0)
    gaps: dict[str, list[float]] = {}
    for member in members:
        model = member.model.to(device)
        found = model.patch_maps(batch) if attention else {}
        for name in attention:
            of_slide = found[name]
            elsewhere[name] += of_slide.elsewhere[0] / len(members)
            _add(sums, (name, of_slide.scale), of_slide.scores[0], subject, len(members))
        for name in set(names) & _METHODS.keys():
            attributed = _METHODS[name](model, batch, risk_of(loss))
            if attributed.gap is not None:
                gaps.setdefault(name, []).append(attributed.gap / member.risk_sd)
            for scale, scores in attributed.scores.items():
                _add(sums, (name, scale), scores / member.risk_sd, subject, len(members))
        model.cpu()
    of_attention = [
        Layer(name, scale, scores, "attention", MODELS[members[0].model.name].maps[name])
        for (name, scale), scores in sums.items()
        if name in attention
    ]
    attributed_layers = [
        Layer(f"{name}-{scale}x", scale, scores, "attribution", MEANING[name])
        for name in (GRADIENT, INTEGRATED)
        for (made, scale), scores in sorted(sums.items())
        if made == name
    ]
    layers = (*of_attention, *attributed_layers)
    facts: dict[str, dict[str, Any]] = {
        layer.name: {"scale": layer.scale, "kind": layer.kind, "meaning": layer.meaning} for layer in layers
    }
    for layer in layers:
        facts[layer.name] |= _facts(layer, elsewhere, gaps)
    return Explained(layers, facts)


def _facts(layer: Layer, elsewhere: Mapping[str, float], gaps: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What is worth knowing of a layer beside its scores."""
    facts: dict[str, Any] = {
        "lowest": float(layer.scores.min()),
        "highest": float(layer.scores.max()),
        "sum": float(layer.scores.sum()),
    }
    if layer.kind == "attention":
        facts["highest_to_mean"] = float(layer.scores.max() / layer.scores.mean())
        facts["attention_elsewhere"] = elsewhere[layer.name]
    method = layer.name.rpartition("-")[0]
    if method in gaps:
        facts["completeness_gap"] = float(np.max(np.abs(gaps[method])))
    return facts


def _add(
    sums: dict[tuple[str, int], Floats], key: tuple[str, int], scores: Tensor, subject: Subject, n_members: int
) -> None:
    """Take one model's scores into the mean, those of the slide's own patches."""
    own: Floats = scores[subject.rows[key[1]]].double().cpu().numpy() / n_members
    if not np.isfinite(own).all():
        message = f"{subject.slide_id}: map {key[0]} is NaN or Inf at {key[1]}x; look at its features: `cfstore verify`"
        raise NonFiniteError(message)
    sums[key] = sums[key] + own if key in sums else own


def standardised_risk(members: Sequence[Member], loss: str, device: torch.device) -> Callable[[BagBatch], float]:
    """The mean over models of the risk of a batch of one slide, each in standard deviations of its fold's risks."""
    models = [member.model.to(device) for member in members]
    of_logits = risk_of(loss)

    @torch.no_grad()
    def risk(batch: BagBatch) -> float:
        moved = batch.to(device)
        own = [float(of_logits(model.logits(moved))[0]) for model in models]
        return float(np.mean([member.standardised(each) for member, each in zip(members, own, strict=True)]))

    return risk


def check(
    risk: Callable[[BagBatch], float], subject: Subject, layers: Sequence[Layer], *, share: float, draws: int, seed: int
) -> dict[str, Deletion]:
    """The deletion check of every map: the risk without the patches it scores highest, and without random ones.

    Without those at whose scale the slide has a single patch: nothing would be left.
    """
    found: dict[str, Deletion] = {}
    for scale, own in subject.rows.items():
        scores = {}
        for layer in layers:
            if layer.scale == scale:
                scores[layer.name] = np.full(subject.batch.lengths[scale][0], -np.inf)
                scores[layer.name][own] = layer.scores
        rows = np.arange(own.start, own.stop)
        if scores:
            found |= deletions(risk, subject.batch, scale, scores, share, draws, seed, rows)
    return {layer.name: found[layer.name] for layer in layers if layer.name in found}


def agreement(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of every attention map with the size of every attribution of its scale."""
    return [
        {"map": one.name, "with": f"|{two.name}|", "spearman": _spearman(one.scores, np.abs(two.scores))}
        for one in layers
        for two in layers
        if not one.signed and two.signed and one.scale == two.scale
    ]


def _spearman(one: Floats, two: Floats) -> float | None:
    """None where one of them does not vary."""
    ranks = [rankdata(one), rankdata(two)]
    if min(np.ptp(each) for each in ranks) == 0:
        return None
    return float(np.corrcoef(*ranks)[0, 1])
