"""A tiny three-scale cohort in a store, real files all the way."""

from __future__ import annotations

import pytest

import cfstore
from cfstore.synth import synthesize


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory):
    """24 synthetic slides at three scales, with labels and five folds."""
    base = tmp_path_factory.mktemp("demo")
    synthesize(base / "h5", slides=24, patches=48, dim=8, seed=3)
    store = cfstore.open(base / "store", create=True)
    store.ingest(base / "h5", cfstore.IngestOptions(encoder="toy"))
    return store


@pytest.fixture
def small():
    """Settings of a run that takes a second."""
    return [
        "train.epochs=2",
        "train.accumulate=4",
        "train.select_from=1",
        "model.embed_dim=8",
        "model.n_heads=2",
        "model.dropout=0.1",
    ]
