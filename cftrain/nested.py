"""Nested validation: an inner model of every fold, trained on part of its training patients, chooses the epoch.

The choice looks at training patients alone: the inner model's epoch of highest C-index on those that it was not
trained on. What is reported is the fold's own model, trained on all its training patients, after that epoch; so the
number is as honest as that of the last epoch. Choosing on the fold that is reported (the paper's rule) is not:
Cawley and Talbot, On over-fitting in model selection and subsequent selection bias in performance evaluation,
JMLR 11 (2010) 2079.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from cftrain.config import RunConfig, TrainConfig
from cftrain.results import Epoch, FoldResult, Nested, predictions_of, scores


def chosen_epoch(epochs: Sequence[Epoch], train: TrainConfig) -> int | None:
    """The epoch, from 1, of highest C-index per slide among those that may be selected, the first of equals.

    Parameters
    ----------
    epochs
        Of the inner model, from the first.
    train
        `select_from` says which may be selected, as for the best epoch on the reported fold.

    Returns
    -------
    int or None
        None where the C-index is undefined in all of them.
    """
    able = [each for each in epochs if each.epoch >= train.first_selectable and math.isfinite(each.c_index)]
    return max(able, key=lambda each: each.c_index).epoch if able else None


def with_choice(own: FoldResult, inner: FoldResult | None, config: RunConfig) -> FoldResult:
    """A fold's result with the epoch that its inner model chose, and the work of both.

    Where the inner model could not choose it is the last epoch of the schedule; where there is none because a single
    epoch may be selected, it is that one.
    """
    if inner is None:
        last = own.last_epoch
        only = Nested(last.epoch, last.c_index, last.c_index_patient, own.last_prediction)
        return dataclasses.replace(own, nested=only)
    assert own.logits is not None  # noqa: S101 - kept where there is an inner model
    found = chosen_epoch(inner.epochs, config.train)
    epoch = found or config.train.epochs
    logits = torch.from_numpy(own.logits[epoch - 1])
    prediction = predictions_of(logits, own.examples.val, own.bins, config.train.loss)
    per_slide, per_patient = scores(own.examples.val, prediction.risk)
    held_out = {example.patient_id: example.event for example in inner.examples.val}
    nested = Nested(
        epoch=epoch,
        c_index=per_slide,
        c_index_patient=per_patient,
        prediction=prediction,
        n_held_out=len(held_out),
        n_held_out_events=sum(held_out.values()),
        c_index_held_out=inner.epochs[found - 1].c_index if found else math.nan,
    )
    return dataclasses.replace(own, work=own.work.plus(inner.work), logits=None, nested=nested)


def nested_rule(config: RunConfig, chosen: Sequence[tuple[int, Nested]]) -> str:
    """How the number was chosen, in words; `chosen` is (fold, choice)."""
    if not config.has_inner:
        return f"nested validation: epoch {config.train.epochs}, the only one that may be selected"
    rule = (
        f"nested validation: the epoch that is best on {100 * config.train.nested:g} % of the training patients, for a "
        "model trained on the others (honest)"
    )
    undecided = [str(fold) for fold, nested in chosen if nested.undecided]
    if not undecided:
        return rule
    where = f"fold {', '.join(undecided)}, where the C-index of those patients is undefined"
    return f"{rule}; the schedule's last epoch in {where}"
