"""Batches and refusals from bytes per patch: worked by hand, and against counts of whole steps."""

from __future__ import annotations

import pytest

from cftrain.budget import BATCH_SHARE, MOST_PATCHES, StepCost, largest_fits, patch_budget, training_cost
from cftrain.errors import ConfigError
from cftrain.footprint import training_footprint

COST = StepCost("crossfusion", "cuda", fixed=1_000_000, per_patch={5: 100.0, 10: 1000.0, 20: 100.0})
TOLERANCE = {"transmil": 0.09, "csmil": 0.07, "mustmil": 0.07, "zoommil": 0.09}
SLIDES = {"a": {5: 10, 10: 40, 20: 950}, "b": {5: 30, 10: 160, 20: 610}, "c": {5: 5, 10: 20, 20: 75}}
"""Slide b has fewer patches than a and takes more memory: 100 * 640 + 1000 * 160 = 224,000 against 136,000."""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("abmil", {}),
        ("csmil", {}),
        ("dsmil", {}),
        ("mustmil", {}),
        ("zoommil", {}),
        ("scmil", {}),
        pytest.param("transmil", {}, marks=pytest.mark.slow),
        pytest.param("crossfusion", {"embed_dim": 64}, marks=pytest.mark.slow),
        pytest.param("crossfusion", {}, marks=pytest.mark.slow),
        pytest.param("crossfusion-single", {}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_line_is_within_2_percent_of_the_count_and_where_the_worst_moment_changes_within_9(
    name, options, device_type
):
    cost = training_cost(name, options, 1024, device_type=device_type)
    for patches in ({5: 16, 10: 64, 20: 256}, {5: 895, 10: 3449, 20: 13496}, {5: 8624, 10: 34498, 20: 137990}):
        counted = training_footprint(name, options, 1024, patches, device_type=device_type).total
        assert cost.nbytes(patches) == pytest.approx(counted, rel=TOLERANCE.get(name, 0.02))


def test_the_largest_slide_is_the_one_of_most_bytes_not_of_most_patches():
    assert largest_fits(COST, SLIDES, free=1_224_000) == "b"


def test_a_slide_that_does_not_fit_is_refused_with_what_to_do():
    with pytest.raises(ConfigError) as refused:
        largest_fits(COST, SLIDES, free=1_223_999)
    said = str(refused.value)
    assert said.startswith(
        "b: training crossfusion on its patches (30 at 5x, 160 at 10x, 610 at 20x) needs 1.2 MB of GPU"
    )
    assert "1.2 MB are free" in said
    assert "narrower model (`cftrain models crossfusion`" in said
    assert "another model" in said
    assert "larger GPU" in said


def test_memory_kept_for_learners_that_share_a_reading_is_named_with_the_way_out():
    with pytest.raises(ConfigError, match=r"0 bytes are free beside 9\.0 GB for the folds, .*; --no-fuse trains them"):
        largest_fits(COST, SLIDES, free=0, others=9_000_000_000)


def test_scales_that_the_model_does_not_read_cost_nothing():
    abmil = StepCost("abmil", "cpu", fixed=0, per_patch={20: 1.0})
    assert largest_fits(abmil, SLIDES, free=950) == "a"
    with pytest.raises(ConfigError, match=r"950 at 20x.*of RAM.*larger machine"):
        largest_fits(abmil, SLIDES, free=949)


def test_the_budget_is_what_a_pencil_says():
    """45, 220 and 1635 of 1900 patches cost 100, 1000 and 100 bytes: 388,000 / 1900 each."""
    free = 11_000_000
    fitting = (free * BATCH_SHARE - 1_000_000) / (388_000 / 1900)
    assert patch_budget(COST, SLIDES, free) == int(fitting)


def test_a_batch_of_the_budget_fits_the_free_memory():
    cost = training_cost("crossfusion", {"embed_dim": 64}, 1024, device_type="cpu")
    slides, free = {"a": {5: 100, 10: 420, 20: 1700}, "b": {5: 90, 10: 330, 20: 1300}}, 180_000_000
    budget = patch_budget(cost, slides, free)
    assert 500 < budget < MOST_PATCHES["cpu"]
    share = {scale: sum(patches[scale] for patches in slides.values()) for scale in (5, 10, 20)}
    batch = {scale: round(budget * n / sum(share.values())) for scale, n in share.items()}
    counted = training_footprint("crossfusion", {"embed_dim": 64}, 1024, batch, device_type="cpu").total
    assert 0.75 * free < counted < free


@pytest.mark.parametrize(("device_type", "most"), [("cpu", 8192), ("cuda", 65536)])
def test_the_budget_ends_at_a_cap_and_never_below_one_patch(device_type, most):
    cost = StepCost("abmil", device_type, fixed=1000, per_patch={20: 1.0})
    assert patch_budget(cost, SLIDES, free=10**12) == most
    assert patch_budget(cost, SLIDES, free=10) == 1
