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
from cftrain.models import BagBatch, PatchMap
from cftrain.prediction.trained import Member
from cftrain.zoo import MODELS

GRADIENT: Final = "gradient"
INTEGRATED: Final = "integrated"
ALL: Final = "all"

_IN_SD: Final = "in standard deviations of the risks of the fold's validated slides"
MEANING: Final = {
    GRADIENT: "Gradient of the risk times the patch's distance from the slide's mean patch: above 0 raises the risk; "
    + _IN_SD,
    INTEGRATED: "Integrated gradients from a slide of mean patches: above 0 raises the risk, all scales add up to its "
    "distance from that slide's; " + _IN_SD,
}
_METHODS: Final[Mapping[str, Callable[..., Attribution]]] = {GRADIENT: gradient, INTEGRATED: integrated}


class Explained(NamedTuple):
    """What `explain` found.

    risk
        Of the whole bag: the mean over models, each in standard deviations of its fold's risks.
    layers
        The maps, attention first, in the order of the model's.
    facts
        Of each layer by name: plain values for heatmap.json.
    """

    risk: float
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
    batch, of_logits = subject.batch.to(device), risk_of(loss)
    meanings = MODELS[members[0].model.name].maps
    means = _Means(subject, names, len(members))
    for member in members:
        model = member.model.to(device)
        if set(names) & meanings.keys():
            logits, maps = model.logits_and_maps(batch)
            means.take_attention(maps)
            risk = float(of_logits(logits.double())[0])
        for method in (each for each in _METHODS if each in names):
            found = _METHODS[method](model, batch, of_logits)
            means.take_attribution(method, found, member.risk_sd)
            risk = found.risk
        means.take_risk(member.standardised(risk))
        model.cpu()
    layers = tuple(
        Layer(name, scale, scores, "attention" if name in meanings else "attribution", _meaning(name, meanings))
        for (name, scale), scores in means.scores.items()
    )
    facts = {layer.name: _facts(layer) | means.notes.get(layer.name, {}) for layer in layers}
    return Explained(means.risk, layers, facts)


class _Means:
    """Means over models of what each finds for the slide's own patches."""

    def __init__(self, subject: Subject, names: Sequence[str], n_members: int) -> None:
        self.risk = 0.0
        self.scores: dict[tuple[str, int], Floats] = {}
        self.notes: dict[str, dict[str, float]] = {}
        self._subject, self._names, self._n_members = subject, names, n_members

    def take_risk(self, risk: float) -> None:
        """One model's risk, in standard deviations."""
        self._check(risk, "its risk")
        self.risk += risk / self._n_members

    def take_attention(self, maps: Mapping[str, PatchMap]) -> None:
        """One model's maps, those that are wanted."""
        for name, found in maps.items():
            if name in self._names:
                self._take(name, found.scale, found.scores[0])
                self._note(name, "attention_elsewhere", found.elsewhere[0])

    def take_attribution(self, method: str, found: Attribution, risk_sd: float) -> None:
        """One model's attribution, brought to standard deviations of its fold's risks."""
        # what integrated gradients miss, as a share of all that they attribute
        total = sum(float(scores.abs().sum()) for scores in found.scores.values())
        for scale, scores in sorted(found.scores.items()):
            self._take(f"{method}-{scale}x", scale, scores / risk_sd)
            if found.gap is not None and total > 0:
                self._note(f"{method}-{scale}x", "completeness_gap", abs(found.gap) / total)

    def _take(self, name: str, scale: int, scores: Tensor) -> None:
        own: Floats = scores[self._subject.rows[scale]].double().cpu().numpy() / self._n_members
        self._check(own, f"map {name} at {scale}x")
        held = self.scores.get((name, scale))
        self.scores[name, scale] = own if held is None else held + own

    def _check(self, values: Floats | float, what: str) -> None:
        if not np.isfinite(values).all():
            slide = self._subject.slide_id
            message = f"{slide}: {what} is NaN or Inf; look at the slide's features with `cfstore verify`"
            raise NonFiniteError(message)

    def _note(self, name: str, fact: str, value: float) -> None:
        """One model's value of what is worth knowing beside the scores."""
        of_map = self.notes.setdefault(name, {})
        of_map[fact] = of_map.get(fact, 0.0) + value / self._n_members


def _meaning(name: str, meanings: Mapping[str, str]) -> str:
    return meanings[name] if name in meanings else MEANING[name.rpartition("-")[0]]


def _facts(layer: Layer) -> dict[str, Any]:
    """A layer in numbers."""
    facts: dict[str, Any] = {
        "scale": layer.scale,
        "kind": layer.kind,
        "meaning": layer.meaning,
        "lowest": float(layer.scores.min()),
        "highest": float(layer.scores.max()),
        "sum": float(layer.scores.sum()),
    }
    if layer.kind == "attention":
        facts["highest_to_mean"] = float(layer.scores.max() / layer.scores.mean())
    return facts


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
    risk: Callable[[BagBatch], float], subject: Subject, explained: Explained, *, share: float, draws: int, seed: int
) -> dict[str, Deletion]:
    """The deletion check of every map: the risk without the patches it scores highest, and without random ones.

    Without those at whose scale the slide has a single patch: nothing would be left.
    """
    layers = explained.layers
    found: dict[str, Deletion] = {}

    def known(batch: BagBatch) -> float:
        """A forward pass of the whole bag may take minutes, and its risk is known."""
        return explained.risk if batch is subject.batch else risk(batch)

    for scale, own in subject.rows.items():
        scores = {}
        for layer in layers:
            if layer.scale == scale:
                scores[layer.name] = np.full(subject.batch.lengths[scale][0], -np.inf)
                scores[layer.name][own] = layer.scores
        rows = np.arange(own.start, own.stop)
        if scores:
            found |= deletions(known, subject.batch, scale, scores, share, draws, seed, rows)
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
