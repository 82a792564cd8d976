"""Ragged attention against a softmax written out, bag by bag, in float64."""

import math
import sys

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional
from torch.testing import assert_close

from cfkernels import RateError, ShapeError, UnavailableError, using
from cfkernels.attention import attention, attention_and_lse, candidates
from cfkernels.dispatch import choose
from cfkernels.dropout import keep_mask

SEED = torch.tensor([-1234567890123456789])
CASES = {
    "one row": ((1,), (1,), 2, 4),
    "one key for three bags of queries": ((2, 5, 3), (1, 1, 1), 4, 8),
    "unequal bags, one head": ((3, 1, 7), (5, 2, 1), 1, 16),
    "class rows of equal bags": ((1, 1, 1), (10, 10, 10), 4, 8),
    "around tile edges": ((63, 64, 65), (129, 1, 128), 2, 32),
    "width not a power of two": ((5, 4), (6, 7), 3, 5),
}
# queries, keys, heads, width of what the kernels take
RAGGED = {
    "one row": ((1,), (1,), 2, 16),
    "less than a tile": ((9,), (13,), 1, 32),
    "a tile, and a tile and a row": ((128, 129), (64, 65), 1, 64),
    "three bags across": ((33, 1, 70), (100, 64, 7), 2, 40),
    "wide heads": ((17, 40), (70, 16), 2, 128),
}
# relative root mean square: the rounding of what goes into the products, and of the result
ROUNDING = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def draw(q_lengths, kv_lengths, n_heads, width, dtype=torch.float64, seed=7):
    """q, k, v and a gradient; q, k and v are views of packed projections, as models have them."""
    generator = torch.Generator().manual_seed(seed)
    n, m = sum(q_lengths), sum(kv_lengths)
    of_q, of_kv, grad = (
        torch.randn(rows, parts, n_heads, width, generator=generator, dtype=torch.float64).to(dtype)
        for rows, parts in ((n, 3), (m, 2), (n, 1))
    )
    return of_q[:, 1].requires_grad_(), *(x.requires_grad_() for x in of_kv.unbind(1)), grad[:, 0]


def masks_of(q_lengths, kv_lengths, n_heads, threshold):
    return [
        torch.stack(
            [keep_mask(SEED, torch.arange(n), m, threshold, stream=bag * n_heads + head) for head in range(n_heads)]
        )
        for bag, (n, m) in enumerate(zip(q_lengths, kv_lengths, strict=True))
    ]


def naive_attention(q, k, v, q_lengths, kv_lengths, masks=None, kept=1.0):
    outputs, i, j = [], 0, 0
    for bag, (n, m) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        scores = torch.einsum("nhd,mhd->hnm", q[i : i + n], k[j : j + m]) / math.sqrt(q.shape[2])
        weights = scores.exp() / scores.exp().sum(dim=2, keepdim=True)
        if masks is not None:
            weights = weights * masks[bag] / kept
        outputs.append(torch.einsum("hnm,mhd->nhd", weights, v[j : j + m]))
        i, j = i + n, j + m
    return torch.cat(outputs)


def error(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def run(name, tensors, lengths, dropout_p=0.0):
    """Output and gradients."""
    q, k, v, grad = tensors
    with using(attention=name):
        out = attention(q, k, v, q_lengths=lengths[0], kv_lengths=lengths[1], dropout_p=dropout_p, seed=SEED)
    return out, *torch.autograd.grad(out, (q, k, v), grad)


def exactly(tensors, lengths, dropout_p=0.0):
    q, k, v, grad = (x.detach().double().requires_grad_() for x in tensors)
    threshold = round(256 * dropout_p)
    masks = masks_of(*lengths, q.shape[1], threshold) if threshold else None
    out = naive_attention(q, k, v, *lengths, masks, 1 - threshold / 256)
    return out, *torch.autograd.grad(out, (q, k, v), grad)


@pytest.mark.parametrize("name", ["sdpa", "blocked", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention_and_gradients_agree_with_a_softmax_written_out(name, case):
    tensors = draw(*case)
    assert_close(run(name, tensors, case[:2]), exactly(tensors, case[:2]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["blocked", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_dropout_is_the_mask_of_its_seed_in_float64(name, case):
    tensors = draw(*case)
    assert_close(run(name, tensors, case[:2], 0.2), exactly(tensors, case[:2], 0.2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_kernels_agree_with_float64(case, dtype, dropout_p):
    tensors = draw(*case, dtype=dtype)
    ours, exact = (f(tensors, case[:2], dropout_p) for f in (lambda *a: run("triton", *a), exactly))
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == dtype
        # one row attends to one key with certainty: q and k have no gradient there but rounding
        assert error(a, b) <= ROUNDING[dtype] or a.double().abs().max() <= ROUNDING[dtype]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("case", [((70, 3), (150, 16), 1, 128), ((128, 129), (128, 5), 1, 64)], ids=str)
def test_the_kernels_as_tuned_for_compute_capability_9_agree_with_float64(monkeypatch, case, dropout_p):
    """Other tiles, and whole tiles apart from the last."""
    monkeypatch.setattr(sys.modules["cfkernels.attention.op"], "architecture", lambda device: 90)
    tensors = draw(*case, dtype=torch.float16)
    for a, b in zip(run("triton", tensors, case[:2], dropout_p), exactly(tensors, case[:2], dropout_p), strict=True):
        assert error(a, b) <= ROUNDING[torch.float16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["triton", "blocked"])
def test_errors_are_at_most_twice_those_of_pytorch(name, dtype):
    """The rule of flash-attention's own tests: each against float64, in the same dtype."""
    lengths = ((70,), (100,))
    tensors = draw(*lengths, 2, 64, dtype=dtype)
    q, k, v, grad = tensors
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(64)
    plain = torch.einsum("hnm,mhd->nhd", scores.softmax(2), v)
    theirs = (plain, *torch.autograd.grad(plain, (q, k, v), grad))
    for a, b, exact in zip(run(name, tensors, lengths), theirs, exactly(tensors, lengths), strict=True):
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max()


def test_the_kernels_drop_what_the_mask_drops():
    """With v = identity and equal scores, the output shows which keys each query kept."""
    n, m = 40, 64
    q, v = torch.zeros(n, 1, m), torch.eye(m)[:, None, :]
    with using(attention="triton"):
        out = attention(q, torch.zeros(m, 1, m), v, q_lengths=(7, 33), kv_lengths=(16, 48), dropout_p=0.3, seed=SEED)
    first, second = masks_of((7, 33), (16, 48), 1, 77)
    assert torch.equal(out[:7, 0, :16] > 0, first[0])
    assert torch.equal(out[7:, 0, 16:] > 0, second[0])


@pytest.mark.parametrize("name", ["triton", "blocked"])
def test_repetition_gives_the_same_bits(name):
    lengths = ((33, 40), (100, 7))
    tensors = draw(*lengths, 2, 32, dtype=torch.float16)
    first, again = (run(name, tensors, lengths, 0.2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("block", [64, 1000])
def test_blocks_of_any_size_give_the_same(block, monkeypatch):
    lengths = ((33, 40), (100, 7))
    tensors = draw(*lengths, 2, 16)
    monkeypatch.setattr(sys.modules["cfkernels.attention.blocked"], "_BLOCK_ELEMENTS", block)
    monkeypatch.setattr(sys.modules["cfkernels.attention.blocked"], "_LEAST_ROWS", 3)
    assert_close(run("blocked", tensors, lengths, 0.2), exactly(tensors, lengths, 0.2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["triton", "blocked", "reference"])
def test_lse_is_the_log_of_the_sum_of_exponentials_whatever_is_dropped(name):
    q, k, v, _ = draw((5, 9), (20, 3), 2, 16, dtype=torch.float32)
    with using(attention=name):
        out, lse = attention_and_lse(q, k, v, q_lengths=(5, 9), kv_lengths=(20, 3), dropout_p=0.5, seed=SEED)
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k.double()) / 4
    expected = torch.cat([scores[:, :5, :20].exp().sum(2).log(), scores[:, 5:, 20:].exp().sum(2).log()], dim=1)
    assert_close(lse.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert out.requires_grad
    assert not lse.requires_grad


def test_dropout_without_a_seed_follows_the_generator_and_keeps_the_mean():
    q, v = torch.zeros(200, 2, 4), torch.ones(100, 2, 4)

    def drop():
        return attention(q, torch.zeros_like(v), v, q_lengths=(200,), kv_lengths=(100,), dropout_p=0.5)

    torch.manual_seed(3)
    first, second = drop(), drop()
    torch.manual_seed(3)
    assert torch.equal(first, drop())
    assert not torch.equal(first, second)
    assert first.mean().item() == pytest.approx(1, abs=0.05)


def test_elements_beyond_two_to_the_31_are_reached(monkeypatch):
    """A bag at the end of views of a 4.6 GB tensor, of which only the last pages are ever touched."""
    n, n_first, width = 4_500_000, 4_499_995, 16
    huge = torch.empty_strided((n, 512), (512, 1), dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    huge[n_first:] = torch.randn(n - n_first, 512, generator=generator).to(torch.float16)
    last = huge[n_first:].double()
    op = sys.modules["cfkernels.attention.op"]
    # only the tiles of the last bag: those of the first would touch every page
    tiles = torch.tensor([[1, 0]], dtype=torch.int32)
    monkeypatch.setattr(op.packing, "row_tiles", lambda lengths, rows, device: tiles)
    monkeypatch.setattr(op, "_fake", lambda q, *_: (small, torch.empty_strided((1, n), (n, 1))))
    small = torch.empty_strided((n, 1, width), (0, width, 1), dtype=torch.float16)
    q, k, v = (huge[:, None, i * width : (i + 1) * width] for i in range(3))
    torch.ops.cfkernels.attention(q, k, v, None, (n_first, n - n_first), (n_first, n - n_first), 0)
    expected = functional.softmax(last[:, :16] @ last[:, 16:32].T / 4, dim=1) @ last[:, 32:48]
    # rows of the output share one address here: what was stored last stays
    assert_close(small[-1, 0].double(), expected[-1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("name", ["triton", "blocked"])
def test_pytorch_accepts_the_ops(name, dropout_p):
    op = torch.ops.cfkernels.attention if name == "triton" else torch.ops.cfkernels.attention_blocked
    q, k, v, _ = draw((3, 2), (4, 5), 1, 16, dtype=torch.float32)
    seed = SEED if dropout_p else None
    opcheck(op.default, (q, k, v, seed, [3, 2], [4, 5], round(256 * dropout_p)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_it_compiles_into_one_graph(dropout_p):
    tensors = draw((33, 40), (100, 7), 2, 16, dtype=torch.float32)
    *qkv, grad = tensors

    def call(q, k, v):
        return attention(q, k, v, q_lengths=(33, 40), kv_lengths=(100, 7), dropout_p=dropout_p, seed=SEED)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(*qkv)
        results.append((out, *torch.autograd.grad(out, qkv, grad)))
    assert_close(*results, rtol=1e-6, atol=1e-6)


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_choice_can_be_seen(monkeypatch):
    def chosen(device, dtype=torch.bfloat16, width=128, *, dropout=False, need_lse=False):
        return choose("attention", candidates(device, dtype, width, dropout, need_lse)).name

    assert chosen(CPU) == "sdpa"
    assert chosen(CPU, dropout=True) == chosen(CPU, need_lse=True) == "blocked"
    monkeypatch.setattr("cfkernels.triton_support.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert chosen(GPU) == chosen(GPU, dropout=True) == "triton"
    assert chosen(GPU, width=20) == "sdpa"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert chosen(GPU) == "sdpa"
    assert chosen(GPU, dropout=True) == chosen(GPU, need_lse=True) == "triton"
    assert chosen(GPU, torch.float64, dropout=True) == "blocked"


REFUSED = {
    "lengths that miss a row": ({"q_lengths": (2, 1)}, "q_lengths"),
    "a bag without keys": ({"kv_lengths": (5, 0)}, "kv_lengths"),
    "another number of bags": ({"kv_lengths": (5,)}, "2 bags, kv_lengths 1"),
    "no bags": ({"q_lengths": (), "kv_lengths": ()}, "q_lengths"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_attention_refuses(changed, message):
    lengths = {"q_lengths": (2, 2), "kv_lengths": (2, 3)} | changed
    with pytest.raises(ShapeError, match=message):
        attention(torch.zeros(4, 2, 8), torch.zeros(5, 2, 8), torch.zeros(5, 2, 8), **lengths)


def test_attention_refuses_heads_that_disagree():
    with pytest.raises(ShapeError, match=r"\[4, 2, 8\], \[5, 4, 4\]"):
        attention(torch.zeros(4, 2, 8), torch.zeros(5, 4, 4), torch.zeros(5, 4, 4), q_lengths=(4,), kv_lengths=(5,))


def test_attention_refuses_rates_and_names_that_cannot_be():
    x = torch.zeros(4, 2, 8)
    with pytest.raises(RateError, match=r"below 1, got 1\.0"):
        attention(x, x, x, q_lengths=(4,), kv_lengths=(4,), dropout_p=1.0)
    with using(attention="sdpa"), pytest.raises(UnavailableError, match="draws other masks"):
        attention(x, x, x, q_lengths=(4,), kv_lengths=(4,), dropout_p=0.5)
    with using(attention="triton"), pytest.raises(UnavailableError, match="head_dim 8 has no kernel"):
        attention(x, x, x, q_lengths=(4,), kv_lengths=(4,))
