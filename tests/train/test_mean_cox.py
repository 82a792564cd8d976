"""The floor: mean patches in a ridge Cox regression, against lifelines and by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter

from cftrain.config import load_config
from cftrain.errors import ConfigError
from cftrain.models import BagBatch, SurvivalOutput, build
from cftrain.survival import c_index

D = 5
EDGES = (4.0, 9.0, 20.0)


class Fold:
    """A training fold whose hazards follow the first feature; the last feature never changes."""

    def __init__(self, n=120, seed=3):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(2.0, 3.0, (n, D)).astype(np.float32)
        self.x[:, -1] = 7
        death = rng.exponential(12 * np.exp(-0.4 * (self.x[:, 0] - 2)))
        censored = rng.exponential(25, n)
        self.time_months, self.event = np.minimum(death, censored), death <= censored
        self.edges = EDGES

    def means(self, scale):
        assert scale == 20
        return torch.from_numpy(self.x)

    def prototypes(self, scale, n):
        raise AssertionError


def slides(rows):
    """Slides of unequal bags whose mean patches are `rows`."""
    bags = []
    for number, row in enumerate(torch.as_tensor(rows).double()):
        off = torch.randn(3 + number, D, dtype=torch.float64)
        bags.append({20: torch.cat([row + off, row - off])})
    return BagBatch.pack([f"slide-{i}" for i in range(len(bags))], bags)


def fitted(fold, **options):
    model = build("mean-cox", D, **options).double()
    model.fit(fold)
    return model


def lifelines_fit(fold, penalizer):
    z = (fold.x[:, :-1] - fold.x[:, :-1].mean(0)) / fold.x[:, :-1].std(0, ddof=1)
    table = pd.DataFrame(z.astype(float)).rename(columns="f{}".format)
    return CoxPHFitter(penalizer=penalizer).fit(table.assign(t=fold.time_months, e=fold.event), "t", "e"), table


def test_log_hazards_are_those_of_lifelines_up_to_what_float32_means_round():
    fold = Fold()
    fit, table = lifelines_fit(fold, 0.1)
    found = fitted(fold, n_bins=1, penalizer=0.1)(slides(fold.x[:7])).logits[:, 0]
    np.testing.assert_allclose(found, fit.predict_log_partial_hazard(table.iloc[:7]), atol=1e-5)


def test_survival_at_the_edges_is_that_of_lifelines():
    fold = Fold()
    fit, table = lifelines_fit(fold, 0.1)
    found = fitted(fold, penalizer=0.1)(slides(fold.x[:7])).survival
    # between follow-ups lifelines draws a line where there is a step; the last one before an edge ends the bin
    last = [max(t for t in fold.time_months if t < edge) for edge in EDGES]
    expected = fit.predict_survival_function(table.iloc[:7], times=last)
    np.testing.assert_allclose(found[:, :3], expected.T, atol=1e-5)


def test_a_bin_in_which_nobody_died_has_a_small_hazard_and_no_infinity():
    fold = Fold()
    fold.edges = (1000.0, 2000.0, 3000.0)
    output = fitted(fold)(slides(fold.x[:3]))
    assert torch.isfinite(output.logits).all()
    assert (output.hazards[:, 1:] < 1e-3).all()


def test_it_ranks_new_slides_of_the_same_kind():
    fold, other = Fold(seed=3), Fold(seed=4)
    output = fitted(fold, penalizer=0.01)(slides(other.x))
    assert c_index(other.time_months, other.event, output.risk.numpy()) > 0.65


def test_before_it_is_fitted_it_predicts_nothing():
    output = build("mean-cox", D).double()(slides(Fold().x[:2]))
    assert torch.isnan(output.logits).all()


def test_what_was_fitted_is_kept_with_the_weights():
    fold = Fold()
    model = fitted(fold)
    other = build("mean-cox", D).double()
    other.load_state_dict(model.state_dict())
    batch = slides(fold.x[:4])
    for name in SurvivalOutput._fields:
        assert torch.equal(getattr(other(batch), name), getattr(model(batch), name))
    assert not list(model.parameters())


def test_a_run_of_it_has_one_epoch_whatever_others_have():
    assert load_config(settings=["model.name=mean-cox", "train.epochs=50"]).train.epochs == 1
    assert load_config(settings=["model.name=abmil", "train.epochs=50"]).train.epochs == 50


def test_a_penalty_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"penalizer must be above 0, got 0\.0"):
        build("mean-cox", D, penalizer=0.0)
