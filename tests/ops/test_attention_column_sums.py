"""Column sums of attention against the column sums of a softmax written out in float64."""

import pytest
import torch
from torch.library import opcheck
from torch.testing import assert_close

from cfkernels import ShapeError, using
from cfkernels.attention import attention_and_lse
from cfkernels.attention_column_sums import attention_column_sums

# queries, keys, heads, width
RAGGED = {
    "one row": ((1,), (1,), 2, 16),
    "a tile, and a tile and a row": ((128, 129), (64, 65), 1, 64),
    "three bags across": ((33, 1, 70), (100, 64, 7), 2, 40),
    "wide heads, more queries than keys": ((300,), (9,), 2, 128),
}


def draw(q_lengths, kv_lengths, n_heads, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    rows = (sum(q_lengths), sum(kv_lengths), sum(kv_lengths))
    return [torch.randn(n, n_heads, width, generator=generator, dtype=torch.float64).to(dtype) for n in rows]


def written_out(q, k, q_lengths, kv_lengths):
    bags = zip(q.double().split(list(q_lengths)), k.double().split(list(kv_lengths)), strict=True)
    scores = [torch.einsum("nhd,mhd->hnm", *bag) * q.shape[2] ** -0.5 for bag in bags]
    return torch.cat([(x.exp() / x.exp().sum(2, keepdim=True)).sum(1) for x in scores], dim=1)


@pytest.mark.parametrize("attending", ["triton", "blocked", "reference"])
@pytest.mark.parametrize("summing", ["triton", "reference"])
@pytest.mark.parametrize("case", RAGGED.values(), ids=RAGGED.keys())
def test_sums_are_those_of_a_softmax_from_the_lse_of_each_implementation(attending, summing, case):
    q, k, v = draw(*case, dtype=torch.float32)
    lengths = {"q_lengths": case[0], "kv_lengths": case[1]}
    with using(attention=attending, attention_column_sums=summing):
        sums = attention_column_sums(q, k, attention_and_lse(q, k, v, **lengths)[1], **lengths)
    assert sums.dtype == torch.float32
    assert_close(sums.double(), written_out(q, k, *case[:2]), rtol=1e-5, atol=1e-6)
    for mass, n in zip(sums.double().split(list(case[1]), dim=1), case[0], strict=True):
        assert_close(mass.sum(1), torch.full((case[2],), n, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_sums_are_those_of_the_rounded_inputs(dtype):
    lengths = {"q_lengths": (70, 3), "kv_lengths": (100, 129)}
    q, k, v = draw(*lengths.values(), 2, 64, dtype=dtype)
    with using(attention="triton", attention_column_sums="triton"):
        sums = attention_column_sums(q, k, attention_and_lse(q, k, v, **lengths)[1], **lengths)
    assert_close(sums.double(), written_out(q, k, *lengths.values()), rtol=1e-5, atol=1e-6)


def test_float64_stays_float64():
    lengths = {"q_lengths": (7, 3), "kv_lengths": (10, 4)}
    q, k, v = draw(*lengths.values(), 2, 5)
    sums = attention_column_sums(q, k, attention_and_lse(q, k, v, **lengths)[1], **lengths)
    assert_close(sums, written_out(q, k, *lengths.values()), rtol=1e-12, atol=1e-12)


def test_the_reference_holds_one_block_of_scores():
    """1,200 x 2,500 scores of two heads would be 24 MB; many blocks give the same sums."""
    lengths = {"q_lengths": (1200,), "kv_lengths": (2500,)}
    q, k, v = draw(*lengths.values(), 2, 16, dtype=torch.float32)
    lse = attention_and_lse(q, k, v, **lengths)[1]
    assert_close(
        attention_column_sums(q, k, lse, **lengths).double(), written_out(q, k, (1200,), (2500,)), rtol=1e-5, atol=1e-6
    )


def test_pytorch_accepts_the_op():
    q, k, _ = draw((3, 2), (4, 5), 1, 16, dtype=torch.float32)
    opcheck(torch.ops.cfkernels.attention_column_sums.default, (q, k, torch.zeros(1, 5), [3, 2], [4, 5]))


def test_refused_inputs_are_named():
    q, k, lse = torch.zeros(4, 2, 8), torch.zeros(5, 2, 8), torch.zeros(2, 4)
    with pytest.raises(ShapeError, match=r"lse must be \[H, T_q\] = \[2, 4\], got \[2, 3\]"):
        attention_column_sums(q, k, lse[:, :3], q_lengths=(4,), kv_lengths=(5,))
    with pytest.raises(ShapeError, match=r"\[4, 2, 8\], \[5, 2, 4\]"):
        attention_column_sums(q, k[..., :4], lse, q_lengths=(4,), kv_lengths=(5,))
    with pytest.raises(ShapeError, match="kv_lengths"):
        attention_column_sums(q, k, lse, q_lengths=(4,), kv_lengths=(4,))


def test_autocast_does_not_round_them():
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(n, 2, 32, generator=generator) for n in (40, 70))
    lengths = {"q_lengths": (10, 30), "kv_lengths": (50, 20)}
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = attention_and_lse(q, k, k, **lengths)
        sums = attention_column_sums(q, k, lse, **lengths)
    totals = torch.stack([sums[:, :50].sum(1), sums[:, 50:].sum(1)], dim=1)
    assert_close(totals, torch.tensor([[10.0, 30.0]] * 2), rtol=1e-5, atol=0)
