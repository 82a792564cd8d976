"""TransMIL: its attention against hand-worked cases and full tables, its maps against the released code's, its memory.

Outputs and gradients of the whole model against the released ones are in test_crossfusion_golden.py.
"""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from cftrain.checkpoints import load_model
from cftrain.cli import main
from cftrain.errors import ConfigError, WeightsError
from cftrain.models import BagBatch, build
from cftrain.models.released import released_model
from cftrain.models.transmil import NystromAttention, inverted, pseudo_inverse

D = 24
OPTIONS = {"embed_dim": 16, "n_heads": 2, "n_landmarks": 5}
CONVERGED = 40
CASES = ("odd", "square", "tiny", "two", "five")


def far_from_zero(module):
    """In float64, every parameter moved so that none can hide."""
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.fixture
def attention():
    """Nyström attention of two heads of width 3 that nothing but softmax attention is left of: no convolution."""

    def make(n_landmarks, iterations=CONVERGED):
        torch.manual_seed(3)
        module = far_from_zero(NystromAttention(6, 2, n_landmarks, iterations))
        torch.nn.init.zeros_(module.convolution.weight)
        return module

    return make


def softmax_attention(module, x, n_front):
    """Dense attention of one bag with n_front keys and values of zero, through the weights of the module."""
    q, k, v = (x @ module.query_key_value.weight.T).view(len(x), 3, 2, 3).permute(1, 2, 0, 3)
    k, v = (functional.pad(rows, (0, 0, n_front, 0)) for rows in (k, v))
    y = functional.scaled_dot_product_attention(q, k, v)
    return y.transpose(0, 1).flatten(1) @ module.out.weight.T + module.out.bias


def rows_of(*lengths, width=6):
    return torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_with_a_landmark_for_every_token_it_is_softmax_attention(attention):
    x = rows_of(7)
    module = attention(n_landmarks=7)
    assert_close(module(x, (7,)), softmax_attention(module, x, n_front=0), rtol=0, atol=1e-8)


def test_tokens_that_are_no_multiple_of_the_landmarks_also_attend_to_zeros_in_front(attention):
    x = rows_of(7)
    module = attention(n_landmarks=9)  # two rows of zeros stand before the seven
    assert_close(module(x, (7,)), softmax_attention(module, x, n_front=2), rtol=0, atol=1e-8)


def test_landmarks_are_means_of_tokens_that_follow_one_another(attention):
    """Four tokens in two pairs of equals: two landmarks are the tokens themselves, and nothing is lost."""
    pair = rows_of(2)
    x = pair.repeat_interleave(2, dim=0)
    module = attention(n_landmarks=2)
    assert_close(module(x, (4,)), softmax_attention(module, x, n_front=0), rtol=0, atol=1e-8)
    apart = module(x[[0, 2, 1, 3]], (4,))  # landmarks of unlike tokens are both the same
    assert (apart - module(x, (4,))[[0, 2, 1, 3]]).abs().max() > 1e-3


def test_values_are_convolved_along_the_rows_of_their_bag(attention):
    """The kernel's last tap but 15 brings every token the value of the next one, and the last token nothing."""
    x = rows_of(3, 4)
    module = attention(n_landmarks=2)
    plain = module(x, (3, 4))
    with torch.no_grad():
        module.convolution.weight[:, 0, 17, 0] = 1
    v = x @ module.query_key_value.weight[12:].T
    following = torch.stack([v[1], v[2], torch.zeros(6), v[4], v[5], v[6], torch.zeros(6)])
    assert_close(module(x, (3, 4)) - plain, following @ module.out.weight.T, rtol=0, atol=1e-12)


def test_the_first_rows_alone_are_those_of_all_rows():
    torch.manual_seed(3)
    module = far_from_zero(NystromAttention(6, 2, 4, 6))
    lengths = (1, 37, 8)
    x = rows_of(*lengths)
    assert_close(module(x, lengths, first_only=True), module(x, lengths)[[0, 1, 38]], rtol=0, atol=1e-12)


def test_the_inverse_of_tables_worked_by_hand():
    turning = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    assert_close(pseudo_inverse(turning[None], 12)[0], torch.tensor([[1.5, -0.5], [-0.5, 1.5]]).double())
    even = torch.full((1, 2, 2), 0.5, dtype=torch.float64)  # singular: it is its own pseudo-inverse
    assert_close(pseudo_inverse(even, 12), even)


def test_the_inverse_is_that_of_a_singular_value_decomposition():
    tables = (2 * torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).softmax(dim=2)
    assert_close(pseudo_inverse(tables, CONVERGED), torch.from_numpy(np.linalg.pinv(tables.numpy())))


def test_one_step_from_a_start_that_all_heads_share():
    """1 x 1 tables a = 1 and 0.5 start at z = a / (1 · 1), so that y = az is 1 and 0.25.

    Then z (13 - 15 y + 7 y² - y³) / 4: 1 and 0.5 · (13 - 3.75 + 0.4375 - 0.015625) / 4.
    """
    tables = torch.tensor([[[1.0]], [[0.5]]], dtype=torch.float64)
    assert pseudo_inverse(tables, 0).flatten().tolist() == [1.0, 0.5]
    assert pseudo_inverse(tables, 1).flatten().tolist() == [1.0, 0.5 * 9.671875 / 4]
    assert pseudo_inverse(tables[1:], 0).item() == 2.0  # 0.5 / (0.5 · 0.5)


def test_the_inverse_is_computed_in_float32_under_autocast():
    torch.manual_seed(2)
    halves = [torch.randn(8, 2, 4).bfloat16() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = inverted(*halves, 6)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, inverted(*(each.float() for each in halves), 6).bfloat16())


def bags_of(*sizes):
    generator = torch.Generator().manual_seed(5)
    return [{20: torch.randn(n, D, generator=generator, dtype=torch.float64)} for n in sizes]


def pack(bags):
    return BagBatch.pack([f"slide-{i}" for i in range(len(bags))], bags)


def small(**options):
    torch.manual_seed(11)
    return far_from_zero(build("transmil", D, **OPTIONS, **options))


def test_three_unequal_slides_packed_equal_the_three_alone_with_gradients_and_maps():
    """4, 23 and 70 patches make 5, 26 and 82 tokens: none, 4 and 3 rows of zeros in front of them."""
    model, bags = small(), bags_of(4, 23, 70)
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)

    def gradients(outputs):
        model.zero_grad()
        sum((output.survival * weights).sum() for output in outputs).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    together, alone = model(pack(bags)), [model(pack([bag])) for bag in bags]
    assert_close(together.logits, torch.cat([output.logits for output in alone]), rtol=0, atol=1e-12)
    assert_close(gradients([together]), gradients(alone), rtol=0, atol=1e-10)
    maps = model.patch_maps(pack(bags))["attention"]
    for i, bag in enumerate(bags):
        own = model.patch_maps(pack([bag]))["attention"]
        assert_close(maps.scores[i], own.scores[0], rtol=0, atol=1e-12)
        assert maps.elsewhere[i] == pytest.approx(own.elsewhere[0], abs=1e-12)


def test_dropout_acts_in_training_only():
    batch = pack(bags_of(30))
    model, without = small(dropout=0.5), small(dropout=0.0)
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(batch).logits, without(batch).logits)
    assert torch.equal(without.train()(batch).logits, without(batch).logits)
    assert not torch.equal(model.train()(batch).logits, model(batch).logits)


@pytest.fixture
def golden(shared):
    arrays = np.load(shared / "golden" / "TransMIL.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files if key != "cfg"}


def released_state(golden):
    return {key[3:]: value for key, value in golden.items() if key.startswith("sd/")}


def slide(golden, case):
    return BagBatch.pack([case], [{20: golden[f"in/{case}/x20"][0].double()}])


@pytest.mark.parametrize("case", CASES)
def test_the_attention_of_the_class_token_equals_the_released_rows_to_1e9(golden, case):
    """In both layers; what each reads is caught on its way."""
    model, read = released_model(released_state(golden)).double(), {}
    for name in ("layer1", "layer2"):
        layer = model.get_submodule(name)
        layer.attention.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    with torch.no_grad():
        model(slide(golden, case))
        for name, x in read.items():
            found = model.get_submodule(name).attention.first_row(x)
            assert_close(found, golden[f"out64/{case}/attn/{name}_cls_row"][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_the_map_is_the_released_row_of_the_class_token_with_the_padding_folded_back(golden, case):
    found = released_model(released_state(golden)).double().patch_maps(slide(golden, case))["attention"]
    n = golden[f"in/{case}/x20"].shape[1]
    row = golden[f"out64/{case}/attn/layer2_cls_row"][0].mean(dim=0)
    side = int(np.ceil(np.sqrt(n)))
    keys = row[len(row) - side * side :].tolist()
    expected = [keys[i] + (keys[n + i] if n + i < side * side else 0) for i in range(n)]
    assert found.scores[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert found.elsewhere[0] == pytest.approx(1 - sum(expected), abs=1e-9)


def test_released_weights_are_imported_with_the_same_answers(golden, tmp_path):
    torch.save(released_state(golden), tmp_path / "transmil.pt")
    done = CliRunner().invoke(main, ["import-weights", str(tmp_path / "transmil.pt"), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert (told["model"], told["feature_dim"]) == ("transmil", 96)
    model = load_model(tmp_path / "transmil.safetensors").double()
    with torch.no_grad():
        output = model(slide(golden, "odd"))
    assert_close(output.logits, golden["out64/odd/logits"], rtol=0, atol=1e-9)


def released_names(E, heads, taps=33):
    """Random tensors under the names of the released code."""
    shapes = {"cls_token": (1, 1, E), "_fc1.0.weight": (E, D), "_fc1.0.bias": (E,)}
    for name, side in (("proj", 7), ("proj1", 5), ("proj2", 3)):
        shapes |= {f"pos_layer.{name}.weight": (E, 1, side, side), f"pos_layer.{name}.bias": (E,)}
    for layer in ("layer1", "layer2"):
        shapes |= {f"{layer}.norm.weight": (E,), f"{layer}.norm.bias": (E,)}
        shapes |= {f"{layer}.attn.to_qkv.weight": (3 * E, E), f"{layer}.attn.to_out.0.weight": (E, E)}
        shapes |= {f"{layer}.attn.to_out.0.bias": (E,), f"{layer}.attn.res_conv.weight": (heads, 1, taps, 1)}
    shapes |= {"norm.weight": (E,), "norm.bias": (E,), "_fc2.weight": (2, E), "_fc2.bias": (2,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_sizes_of_released_weights_are_read_from_the_tensors():
    state = released_names(E=12, heads=4)
    model = released_model(state, n_heads=1)  # CrossFusion's; here the tensors tell
    options = model.options
    assert (options.embed_dim, options.n_heads, options.n_landmarks, options.n_bins) == (12, 4, 6, 2)
    assert torch.equal(model.layer2.attention.convolution.weight, state["layer2.attn.res_conv.weight"])
    assert torch.equal(model.ppeg.conv5.weight, state["pos_layer.proj1.weight"])


def test_released_weights_of_another_form_are_refused_by_name():
    with pytest.raises(WeightsError, match=r"layer1\.attention\.convolution\.weight: the released tensor is \[4, 1, 9"):
        released_model(released_names(E=12, heads=4, taps=9))


class LargestResult(TorchDispatchMode):
    """The largest number of elements that any operation answers with."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in (out if isinstance(out, (tuple, list)) else (out,)) if torch.is_tensor(each)]
        self.elements = max([self.elements, *(each.numel() for each in tensors)])
        return out


def test_no_table_of_tokens_and_landmarks_of_all_heads_is_made():
    """Of 8 heads, 32 landmarks and 10,202 rows one has 2.6 million elements; queries, keys and values are 1 million."""
    model = build("transmil", 4, embed_dim=32, n_heads=8, n_landmarks=32)
    batch = BagBatch.pack(["large"], [{20: torch.randn(10_201, 4)}])
    with LargestResult() as training:
        model.train()(batch).logits.sum().backward()
    with LargestResult() as maps:
        model.patch_maps(batch)
    n_rows = 32 * -(-10_202 // 32)
    assert training.elements == maps.elements == n_rows * 3 * 32


def test_a_width_that_its_heads_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="transmil: embed_dim must be a multiple of n_heads, got embed_dim=30, n_h"):
        build("transmil", D, embed_dim=30, n_heads=4)
    with pytest.raises(ConfigError, match="n_landmarks must be at least 1, got 0"):
        build("transmil", D, n_landmarks=0)
