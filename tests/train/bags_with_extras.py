"""Bags packed with made-up extras of all the models that a test builds, so that one batch serves any of them."""

from cftrain import zoo
from cftrain.errors import MissingScaleError
from cftrain.models import BagBatch, made_up_slide


def extras_of(models):
    """Of (name, options) of models, or names with their default options."""
    pairs = [(each, {}) if isinstance(each, str) else each for each in models]
    return sorted({extra for name, options in pairs for extra in zoo.model_options(name, options).extras()})


def pack_with_extras(bags, extras, slide_ids=None):
    """Pack bags with extras; none where a bag lacks a scale of theirs, which the packing refuses or the model does."""
    names = slide_ids or [f"slide-{i}" for i in range(len(bags))]
    try:
        made = [
            made_up_slide({s: len(rows) for s, rows in bag.items()}, 1, _within(bag, extras)).extras for bag in bags
        ]
    except MissingScaleError:
        made = [{} for _ in bags]
    return BagBatch.pack(names, bags, made)


def _within(bag, extras):
    return [extra for extra in extras if {extra.scale, extra.rows_of} - {0} <= bag.keys()]
