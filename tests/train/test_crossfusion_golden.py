"""CrossFusion, its ablation, ABMIL and TransMIL against outputs of the released code, run in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cftrain.errors import WeightsError
from cftrain.models import BagBatch, attention_maps, build
from cftrain.models.released import from_released, place, released_model

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "golden"
SCALES = (5, 10, 20)
CASES = [
    (file, case)
    for file, cases in {
        "CrossFusion": ("odd", "square", "tiny", "two", "five", "batch2"),
        "CrossFusionConcat": ("odd", "square", "tiny", "two", "five", "batch2"),
        "AMIL": ("odd", "square", "tiny", "two", "five"),
        "TransMIL": ("odd", "square", "tiny", "two", "five"),
    }.items()
    for case in cases
]


class Golden:
    """One file: the released weights in our model, and what the released code answered."""

    def __init__(self, path: Path) -> None:
        self.arrays = {key: torch.from_numpy(array) for key, array in numeric_arrays(path).items()}
        config = json.loads(str(np.load(path)["cfg"]))
        self.model = released_model(self.under("sd/"), n_heads=config.get("heads", 4)).double()

    def under(self, prefix):
        return {key.removeprefix(prefix): a for key, a in self.arrays.items() if key.startswith(prefix)}

    def batch(self, case, dtype=torch.float64):
        x = {scale: self.arrays[f"in/{case}/x{scale}"].to(dtype) for scale in SCALES}
        n_slides = len(x[5])
        bags = [{scale: x[scale][i] for scale in SCALES} for i in range(n_slides)]
        return BagBatch.pack([f"{case}-{i}" for i in range(n_slides)], bags)

    def loss(self, case, output):
        """The released NLL with alpha 0.2, from hazards and survival."""
        label, censored = self.arrays[f"in/{case}/label"], self.arrays[f"in/{case}/c"].double()
        slides = torch.arange(len(label))
        survival = torch.cat([torch.ones(len(label), 1), output.survival], dim=1)
        event_nll = -survival[slides, label].log() - output.hazards[slides, label].log()
        censored_nll = -survival[slides, label + 1].log()
        return ((1 - censored) * event_nll + (1 - 0.2) * censored * censored_nll).mean()


def numeric_arrays(path):
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files if key != "cfg"}


@pytest.fixture(scope="module")
def golden_files():
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden data at {GOLDEN}")
    return {name: Golden(GOLDEN / f"{name}.npz") for name in {file for file, _ in CASES}}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def golden_case(request, golden_files):
    file, case = request.param
    return golden_files[file], case


def test_outputs_equal_the_released_ones_to_1e9_in_float64(golden_case):
    golden, case = golden_case
    with torch.no_grad():
        output = golden.model(golden.batch(case))
    for field, value in output._asdict().items():
        assert_close(value, golden.arrays[f"out64/{case}/{field}"], rtol=0, atol=1e-9, msg=field)


def test_outputs_in_float32_stay_within_1e5_of_the_released_float64_ones(golden_case):
    golden, case = golden_case
    with torch.no_grad():
        logits = golden.model.float()(golden.batch(case, torch.float32)).logits
    golden.model.double()  # exact: the released weights are float16 values
    assert_close(logits.double(), golden.arrays[f"out64/{case}/logits"], rtol=0, atol=1e-5)


def test_gradients_equal_the_released_ones_to_1e9(golden_case):
    golden, case = golden_case
    golden.model.zero_grad()
    loss = golden.loss(case, golden.model(golden.batch(case)))
    assert_close(loss, golden.arrays[f"out64/{case}/loss_nll"], rtol=1e-9, atol=0)
    loss.backward()
    expected_norms = golden.under(f"gradnorm64/{case}/")
    for key, expected in golden.under(f"grad64/{case}/").items():
        assert_gradient_close(released_gradient(golden.model, key).reshape(expected.shape), expected, key)
    for key, expected in expected_norms.items():
        assert_gradient_close(released_gradient(golden.model, key).norm(), expected, key)


def test_gradients_in_float32_stay_within_1e4_of_the_released_float64_ones(golden_case):
    golden, case = golden_case
    golden.model.float().zero_grad()
    golden.loss(case, golden.model(golden.batch(case, torch.float32))).backward()
    gradients = {key: released_gradient(golden.model, key).double() for key in golden.under("sd/")}
    golden.model.double()
    for key, expected in golden.under(f"grad64/{case}/").items():
        difference = (gradients[key].reshape(expected.shape) - expected).norm().item()
        # a softmax does not see a shift: the gradient of a key's bias is rounding, of any size but small
        assert difference <= max(1e-4 * expected.norm().item(), 1e-6), key


def test_input_gradients_equal_the_released_ones_to_1e9(golden_case):
    golden, case = golden_case
    batch = golden.batch(case)
    rows = {scale: batch.features[scale].requires_grad_() for scale in golden.model.scales}
    golden.loss(case, golden.model(batch)).backward()
    for scale in rows:
        expected = golden.arrays.get(f"gradin64/{case}/x{scale}")
        if expected is None:
            continue
        gradient = rows[scale].grad.reshape(len(batch), -1, batch.features[scale].shape[1])
        if expected.shape != gradient.shape:  # big bags are stored as mean and mean magnitude over D
            gradient = torch.stack([gradient.mean(dim=2), gradient.abs().mean(dim=2)])
        assert_gradient_close(gradient, expected, f"x{scale}")


MAPS = {
    "coarse_cross": "coarse_cross_attention",
    "fine_cross": "fine_cross_attention",
    "coarse_pt_pre": "coarse_transformer.pre.0",
    "coarse_pt_post": "coarse_transformer.post.0",
    "fine_pt_pre": "fine_transformer.pre.0",
    "fine_pt_post": "fine_transformer.post.0",
    "source_pt_pre": "source_transformer.pre.0",
    "source_pt_post": "source_transformer.post.0",
    "final_pre": "final_transformer.pre.0",
    "final_post": "final_transformer.post.0",
}


@pytest.mark.parametrize(("file", "case"), [pair for pair in CASES if pair[0].startswith("CrossFusion")])
def test_attention_maps_equal_the_released_column_means_to_1e9(golden_files, file, case):
    golden = golden_files[file]
    with torch.no_grad(), attention_maps(golden.model, every_row=True) as maps:
        output = golden.model(golden.batch(case))
    assert_close(output.logits, golden.arrays[f"out64/{case}/logits"], rtol=0, atol=1e-9)
    assert sorted(maps) == sorted(MAPS.values())
    for released, ours in MAPS.items():
        expected = golden.arrays[f"out64/{case}/attn/{released}"]
        assert_close(torch.stack(maps[ours]), expected.double(), rtol=0, atol=1e-9, msg=released)


def released_gradient(model, key):
    name, half = place(key, model.name)
    gradient = model.get_parameter(name).grad
    return gradient if half is None else gradient.chunk(2)[half]


def assert_gradient_close(ours, theirs, name):
    """1e-9 of the gradient's norm; gradients that are 0 but for rounding (k biases) by their absence."""
    difference, size = (ours - theirs).norm().item(), theirs.norm().item()
    assert difference <= max(1e-9 * size, 1e-13), f"{name}: off by {difference:.1e}, of {size:.1e}"


def test_every_released_tensor_has_one_place_in_our_model(golden_files):
    for golden in golden_files.values():
        places = [place(key, golden.model.name) for key in golden.under("sd/")]
        assert len(set(places)) == len(places)
        assert {name for name, _ in places} == set(golden.model.state_dict())


def test_released_weights_of_another_width_are_refused_by_name(golden_files):
    other = build("crossfusion", 80, embed_dim=64)
    with pytest.raises(WeightsError, match=r"coarse_projection\.0\.weight: the released tensor is \[64, 96\]"):
        from_released(golden_files["CrossFusion"].under("sd/"), other)
