"""Dropout masks against Philox written in whole numbers, and their statistics."""

import pytest
import torch
import triton
import triton.language as tl

from cfkernels import RateError
from cfkernels.dropout import draw_seed, keep_mask, random_bytes, rescale, threshold
from cfkernels.dropout.kernel import keep_block

SEED = 0x9F3A_1C55_0B7E_D201 - 2**64  # its upper half has the sign bit
WORD = 2**32 - 1


def philox(key, counter, rounds=7):
    """Philox 4x32 by Salmon et al. 2011, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def test_philox_with_ten_rounds_gives_the_known_answers_of_its_authors():
    """kat_vectors of Random123: philox4x32-10."""
    zeros = philox((0, 0), (0, 0, 0, 0), rounds=10)
    assert [f"{word:08x}" for word in zeros] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    ones = philox((WORD, WORD), (WORD,) * 4, rounds=10)
    assert [f"{word:08x}" for word in ones] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def byte(row, column, stream):
    words = philox((SEED & WORD, SEED >> 32 & WORD), (column // 16, row, stream, 0))
    return words[column % 16 // 4] >> 8 * (column % 4) & 0xFF


def test_a_mask_is_the_bytes_of_philox():
    rows = torch.tensor([0, 1, 5, 2**31 + 7])
    mask = keep_mask(torch.tensor([SEED]), rows, 37, 51, stream=9)
    assert mask.tolist() == [[byte(row, column, 9) >= 51 for column in range(37)] for row in rows.tolist()]


def test_the_bytes_of_several_streams_at_once_are_those_of_their_masks():
    """What blocked attention and other devices use; rows that need more than 16 bits among them."""
    seed, rows, streams = (
        torch.tensor([SEED]),
        torch.tensor([0, 3, 70_000, 2**31 + 7]),
        torch.tensor([0, 9, 4_000_000_000]),
    )
    drawn = random_bytes(seed, rows, 37, streams)
    for stream, found in zip(streams.tolist(), drawn, strict=True):
        assert torch.equal(found >= 51, keep_mask(seed, rows, 37, 51, stream=stream))
        assert found.tolist() == [[byte(row, column, stream) for column in range(37)] for row in rows.tolist()]


@triton.jit
def mask_kernel(out_ptr, seed_ptr, first_row, group, stream, R: tl.constexpr, C: tl.constexpr):
    rows = first_row + tl.arange(0, R)
    kept = keep_block(tl.load(seed_ptr), rows, group + tl.arange(0, C // 16), stream, 51, R, C)
    tl.store(out_ptr + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :], kept.to(tl.int8))


def test_kernels_make_the_same_mask():
    out = torch.empty(8, 64, dtype=torch.int8)
    mask_kernel[(1,)](out, torch.tensor([SEED]), 100, 3, 9, 8, 64)
    expected = keep_mask(torch.tensor([SEED]), torch.arange(100, 108), 112, 51, stream=9)[:, 48:]
    assert torch.equal(out.bool(), expected)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_masks_keep_the_share_they_promise_and_rows_and_columns_are_unrelated(rate):
    """Bounds of 5 standard deviations of independent draws."""
    n = 512
    mask = keep_mask(torch.tensor([SEED]), torch.arange(n), n, threshold(rate)).double()
    kept = 1 - threshold(rate) / 256
    assert abs(mask.mean().item() - kept) < 5 * (kept * (1 - kept)) ** 0.5 / n
    for table in (mask, mask.T):
        correlation = torch.corrcoef(table).fill_diagonal_(0)
        assert correlation.abs().max().item() < 6 / n**0.5


def test_rates_are_256ths_and_means_are_exact():
    assert [threshold(rate) for rate in (0, 0.2, 0.3, 0.5, 0.999)] == [0, 51, 77, 128, 255]
    assert rescale(51) == 256 / 205
    with pytest.raises(RateError):
        threshold(-0.1)


def test_seeds_are_fresh_and_follow_the_generator():
    torch.manual_seed(1)
    first, second = (draw_seed(torch.device("cpu")) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)


def test_outputs_of_kernels_start_as_nan_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.zeros(2).new_empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.bfloat16)).isnan().all()
    assert torch.empty(3, dtype=torch.int32).eq(2**31 - 1).all()
