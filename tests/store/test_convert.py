"""Source rows to stored rows; NumPy's casts, numcodecs' BitRound and sums by hand are the oracles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from cfstore.convert import ARRAY_DTYPE, DTYPES, Affine, BagConverter, Measured, RangeMeter, dequantise
from cfstore.errors import NonFiniteError, PrecisionError, ShapeError

PATH = Path("s.h5")
SOURCES = ("float16", "float32", "float64")


def convert_all(
    rows: NDArray[Any], dtype: str, step: int = 50, coords: NDArray[Any] | None = None, affine: Affine | None = None
) -> tuple[NDArray[Any], Measured]:
    if dtype == "int8" and affine is None:
        affine = affine_of(rows, step)
    converter = BagConverter(PATH, dtype, rows.shape[1], affine)
    stored = [converter.convert(rows[at : at + step]).copy() for at in range(0, len(rows), step)]
    return np.concatenate(stored), converter.finish(coords)


def affine_of(rows: NDArray[Any], step: int = 50) -> Affine:
    meter = RangeMeter(rows.shape[1])
    for at in range(0, len(rows), step):
        meter.add(PATH, rows[at : at + step])
    return meter.affine()


def bit_rounded(values: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(numcodecs.BitRound(keepbits=7).encode(values.astype(np.float16))).view(np.float16)


@pytest.fixture(params=[(1, 1), (1, 1025), (203, 77), (64, 1024), (3, 70_000)], ids=str)
def rows64(request: pytest.FixtureRequest, rng: np.random.Generator) -> NDArray[np.float64]:
    """Values over 15 orders of magnitude: those that float16 rounds to zero, to subnormals, to normals."""
    shape = request.param
    return rng.normal(size=shape) * 10.0 ** rng.uniform(-12, 3, shape)


@pytest.mark.parametrize("source", SOURCES)
def test_float16_rows_are_what_numpy_casts_to(source: str, rows64: NDArray[np.float64]) -> None:
    rows = rows64.astype(source)
    stored, _ = convert_all(rows, "float16")
    assert stored.dtype == np.float16
    assert stored.tobytes() == rows.astype(np.float16).tobytes()


@pytest.mark.parametrize("source", SOURCES)
def test_float32_rows_are_what_numpy_casts_to(source: str, rows64: NDArray[np.float64]) -> None:
    rows = rows64.astype(source)
    stored, _ = convert_all(rows, "float32")
    assert stored.dtype == np.float32
    assert stored.tobytes() == rows.astype(np.float32).tobytes()


@pytest.mark.parametrize("source", SOURCES)
def test_float16_rounded_rows_are_what_bitround_makes_of_float16(source: str, rows64: NDArray[np.float64]) -> None:
    rows = rows64.astype(source)
    stored, _ = convert_all(rows, "float16-rounded")
    assert stored.dtype == np.float16
    assert stored.tobytes() == bit_rounded(rows).tobytes()


def test_every_float16_is_rounded_as_bitround_does() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.abs(every) <= 65_280].reshape(-1, 1)  # drops NaN too
    stored, _ = convert_all(every, "float16-rounded", step=len(every))
    assert stored.tobytes() == bit_rounded(every).tobytes()
    kept = every[: 1 << 14].astype(np.float32)
    assert (np.abs(stored[: 1 << 14] - kept) <= np.maximum(kept * 2.0**-8, 2.0**-22)).all()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", ["float16", "float16-rounded", "float32"])
def test_errors_are_those_of_the_stored_rows(dtype: str, source: str, rows64: NDArray[np.float64]) -> None:
    rows = rows64.astype(source)
    stored, measured = convert_all(rows, dtype)
    exact = rows.astype(np.float64)
    error = stored - exact
    assert measured.n_patches == len(rows)
    assert measured.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-6)
    assert measured.rms_relative_error == pytest.approx(np.sqrt((error**2).sum() / (exact**2).sum()), rel=1e-4)


@pytest.mark.parametrize(("source", "dtype"), [("float16", "float16"), ("float16", "float32"), ("float32", "float32")])
def test_lossless_is_exactly_lossless(source: str, dtype: str, rows64: NDArray[np.float64]) -> None:
    _, measured = convert_all(rows64.astype(source), dtype)
    assert (measured.max_abs_error, measured.rms_relative_error) == (0.0, 0.0)


def test_values_that_float16_loses_wholly_are_an_error_of_one() -> None:
    _, measured = convert_all(np.full((5, 3), 1e-20, np.float32), "float16")
    assert measured.max_abs_error == pytest.approx(1e-20)
    assert measured.rms_relative_error == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_zero_rows_have_no_error(dtype: str) -> None:
    stored, measured = convert_all(np.zeros((9, 5), np.float64), dtype)
    assert not stored.any()
    assert (measured.max_abs_error, measured.rms_relative_error) == (0.0, 0.0)


@pytest.mark.parametrize("source", SOURCES)
def test_int8_rows_are_within_half_a_step_of_the_source(source: str, rng: np.random.Generator) -> None:
    rows = (rng.normal(size=(301, 77)) * 10 ** rng.uniform(-3, 3, 77) + rng.normal(size=77)).astype(source)
    affine = affine_of(rows)
    stored, measured = convert_all(rows, "int8", affine=affine)
    assert stored.dtype == np.uint8
    assert (stored.min(axis=0) == 0).all()
    assert (stored.max(axis=0) == 255).all()
    values = dequantise(stored, affine)
    assert values.dtype == np.float32
    step = (rows.max(axis=0).astype(float) - rows.min(axis=0)) / 255
    assert (np.abs(values - rows.astype(float)) <= step * 0.501 + 1e-6).all()
    error = values - rows.astype(float)
    assert measured.max_abs_error == pytest.approx(np.abs(error).max(), rel=1e-5)
    expected = np.sqrt((error**2).sum() / (rows.astype(float) ** 2).sum())
    assert measured.rms_relative_error == pytest.approx(expected, rel=1e-4)


def test_constant_channels_come_back_exactly() -> None:
    rows = np.tile(np.float32([0.1, -3e-39, 0, 70_000.123]), (40, 1))
    affine = affine_of(rows)
    stored, measured = convert_all(rows, "int8", affine=affine)
    assert not affine.scale.any()
    assert np.array_equal(dequantise(stored, affine), rows)
    assert measured.max_abs_error == 0


def test_int8_serves_very_large_and_very_small_ranges() -> None:
    rows = np.float32([[-8e37, 1e-38], [8e37, 3e-38], [0, 2e-38]])
    affine = affine_of(rows)
    stored, measured = convert_all(rows, "int8", affine=affine)
    assert stored[:, 0].tolist() == [0, 255, 128]  # 127.5, to even
    assert np.isfinite([measured.max_abs_error, measured.rms_relative_error]).all()
    assert measured.rms_relative_error < 0.01


def test_a_range_is_that_of_all_bags_of_the_slide() -> None:
    meter = RangeMeter(2)
    meter.add(Path("5x.h5"), np.float16([[1, 7]]))
    meter.add(Path("10x.h5"), np.float64([[-1, 7], [0.5, 6]]))
    affine = meter.affine()
    assert affine.zero.tolist() == [-1, 6]
    assert affine.scale.tolist() == np.float32([2 / 255, 1 / 255]).tolist()


def test_dequantised_rows_go_where_they_are_wanted() -> None:
    out = np.empty((1, 3), np.float32)
    given = dequantise(np.uint8([[0, 1, 255]]), Affine(np.float32([2, 3, 1]), np.float32([0.5, 0, -1])), out)
    assert given is out
    assert out.tolist() == [[0.5, 3, 254]]


def test_a_row_outside_the_range_of_the_first_pass_is_refused() -> None:
    affine = affine_of(np.float32([[0], [1]]))
    with pytest.raises(PrecisionError, match=r"s\.h5: a feature lies outside the range"):
        convert_all(np.float32([[2]]), "int8", affine=affine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_coords", [True, False])
def test_the_digest_is_xxh3_of_the_stored_rows_whatever_the_blocks(
    dtype: str, with_coords: bool, rng: np.random.Generator
) -> None:
    rows = rng.normal(size=(203, 77)).astype(np.float32)
    coords = rng.integers(0, 90_000, (203, 2)).astype(np.int32) if with_coords else None
    affine = affine_of(rows) if dtype == "int8" else None
    found = [convert_all(rows, dtype, step, coords, affine) for step in (1, 10, 203)]
    stored = found[0][0].tobytes() + (coords.tobytes() if coords is not None else b"")
    if affine is not None:
        stored = affine.scale.tobytes() + affine.zero.tobytes() + stored
    expected = f"xxh3-128:{xxhash.xxh3_128_hexdigest(stored)}"
    assert [measured.digest for _, measured in found] == [expected] * 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_bag_has_the_digest_of_nothing_and_no_error(dtype: str) -> None:
    affine = Affine(np.empty(0, np.float32), np.empty(0, np.float32)) if dtype == "int8" else None
    converter = BagConverter(PATH, dtype, 4, affine)
    assert converter.convert(np.empty((0, 4), np.float32)).shape == (0, 4)
    assert converter.finish(None) == Measured(0, f"xxh3-128:{xxhash.xxh3_128_hexdigest(b'')}", 0.0, 0.0)


@pytest.mark.parametrize("layout", ["F", "strided", "big-endian"])
def test_rows_of_any_layout_are_stored_in_c_order(layout: str, rng: np.random.Generator) -> None:
    rows = rng.normal(size=(60, 14)).astype(np.float32)
    given: dict[str, NDArray[Any]] = {
        "F": np.asfortranarray(rows),
        "strided": np.repeat(rows, 2, axis=1)[:, ::2],
        "big-endian": rows.astype(">f4"),
    }
    for dtype in ("float16", "float32"):
        stored, measured = convert_all(given[layout], dtype)
        expected, wanted = convert_all(rows, dtype)
        assert stored.tobytes() == expected.tobytes()
        assert measured == wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", ["float16", "float16-rounded", "float32"])
def test_nan_and_inf_are_refused_with_the_row_counted_over_the_bag(dtype: str, source: str, bad: float) -> None:
    rows = np.ones((130, 3), source)
    rows[[72, 90], [0, 2]] = bad
    message = r"^s\.h5: row 72 has NaN or Inf features \(2 of the first 100 patches do\); extract the slide again$"
    with pytest.raises(NonFiniteError, match=message):
        convert_all(rows, dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", SOURCES)
def test_the_first_pass_refuses_nan_and_inf_with_the_row_of_the_file_at_hand(source: str, bad: float) -> None:
    meter = RangeMeter(3)
    meter.add(Path("5x.h5"), np.ones((500, 3), source))
    meter.add(Path("10x.h5"), np.ones((50, 3), source))
    rows = np.ones((50, 3), source)
    rows[4, 1] = bad
    with pytest.raises(NonFiniteError, match=r"^10x\.h5: row 54 has NaN or Inf features \(1 of the first 100 "):
        meter.add(Path("10x.h5"), rows)


@pytest.mark.parametrize(
    ("value", "source", "dtype", "message"),
    [
        (65_505, "float32", "float16", "65,505 does not fit float16 (at most 65,504); store this encoder with "),
        (-7e4, "float64", "float16", "70,000 does not fit float16 (at most 65,504); store this encoder with --dtype"),
        (65_504, "float16", "float16-rounded", "65,504 does not fit float16-rounded (at most 65,280); store"),
        (65_281, "float32", "float16-rounded", "65,281 does not fit float16-rounded (at most 65,280); store"),
        (1e39, "float64", "float16", "1e+39 does not fit float16 (at most 65,504); extract the slide again"),
        (1e39, "float64", "float32", "1e+39 does not fit float32 (at most 3.40282e+38); extract the slide again"),
        (2e38, "float32", "int8", "2e+38 does not fit int8 (at most 8.50706e+37); store this encoder with --dtype"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_values_beyond_the_dtype_are_refused(value: float, source: str, dtype: str, message: str) -> None:
    rows = np.zeros((7, 3), source)
    rows[3, 1] = value
    with pytest.raises(PrecisionError) as caught:
        convert_all(rows, dtype)
    assert f"s.h5: a feature of magnitude {message}" in str(caught.value)


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 65_504), ("float16-rounded", 65_280)])
def test_the_largest_value_of_the_dtype_is_kept(dtype: str, largest: float) -> None:
    stored, measured = convert_all(np.float32([[largest, -largest]]), dtype)
    assert stored.tolist() == [[largest, -largest]]
    assert measured.max_abs_error == 0


@pytest.mark.parametrize("shape", [(3, 5), (12,), (2, 2, 4)], ids=str)
def test_rows_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"expected \[rows, 4\]"):
        BagConverter(PATH, "float16", 4).convert(np.zeros(shape, np.float32))
    with pytest.raises(ShapeError, match=r"expected \[rows, 4\]"):
        RangeMeter(4).add(PATH, np.zeros(shape, np.float32))


def test_only_int8_takes_scale_and_zero() -> None:
    with pytest.raises(ValueError, match="float16 takes none"):
        BagConverter(PATH, "float16", 1, Affine(np.ones(1, np.float32), np.ones(1, np.float32)))
    with pytest.raises(ValueError, match="int8 needs"):
        BagConverter(PATH, "int8", 1)


def test_the_array_dtypes_are_those_of_the_store() -> None:
    assert set(ARRAY_DTYPE) == set(DTYPES)
    assert [np.dtype(ARRAY_DTYPE[dtype]).itemsize for dtype in DTYPES] == [2, 2, 4, 1]
