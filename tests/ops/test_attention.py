"""Ragged attention against a softmax written out, bag by bag, in float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from cfkernels import ShapeError, attention

CASES = {
    "one row": ((1,), (1,), 2, 4),
    "one key for three bags of queries": ((2, 5, 3), (1, 1, 1), 4, 8),
    "unequal bags, one head": ((3, 1, 7), (5, 2, 1), 1, 16),
    "class rows of equal bags": ((1, 1, 1), (10, 10, 10), 4, 8),
    "around tile edges": ((63, 64, 65), (129, 1, 128), 2, 32),
    "width not a power of two": ((5, 4), (6, 7), 3, 5),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def inputs(request):
    q_lengths, kv_lengths, n_heads, width = request.param
    generator = torch.Generator().manual_seed(7)
    rows = (sum(q_lengths), sum(kv_lengths), sum(kv_lengths))
    tensors = [torch.randn(n, n_heads, width, generator=generator, dtype=torch.float64) for n in rows]
    return [tensor.requires_grad_() for tensor in tensors], q_lengths, kv_lengths


def naive_attention(q, k, v, q_lengths, kv_lengths):
    outputs, i, j = [], 0, 0
    for n, m in zip(q_lengths, kv_lengths, strict=True):
        scores = torch.einsum("nhd,mhd->hnm", q[i : i + n], k[j : j + m]) / math.sqrt(q.shape[2])
        weights = scores.exp() / scores.exp().sum(dim=2, keepdim=True)
        outputs.append(torch.einsum("hnm,mhd->nhd", weights, v[j : j + m]))
        i, j = i + n, j + m
    return torch.cat(outputs)


def test_attention_agrees_with_a_softmax_written_out(inputs):
    (q, k, v), q_lengths, kv_lengths = inputs
    output = attention(q, k, v, q_lengths=q_lengths, kv_lengths=kv_lengths)
    assert_close(output, naive_attention(q, k, v, q_lengths, kv_lengths), rtol=1e-12, atol=1e-12)


def test_attention_gradients_agree_with_a_softmax_written_out(inputs):
    (q, k, v), q_lengths, kv_lengths = inputs
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    output = attention(q, k, v, q_lengths=q_lengths, kv_lengths=kv_lengths)
    expected = naive_attention(q, k, v, q_lengths, kv_lengths)
    ours = torch.autograd.grad((output * weight).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_attention_dropout_is_random_and_keeps_the_mean():
    q, v = torch.zeros(200, 2, 4), torch.ones(100, 2, 4)
    outputs = [
        attention(q, torch.zeros_like(v), v, q_lengths=(200,), kv_lengths=(100,), dropout_p=0.5) for _ in range(2)
    ]
    assert not torch.equal(*outputs)
    assert outputs[0].mean().item() == pytest.approx(1, abs=0.05)


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
