"""docs/scale.md says what the results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import scale_tables

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"


def test_tables_are_those_of_the_results():
    page = PAGE.read_text()
    assert scale_tables.filled(page, scale_tables.read_results()) == page, "run `python benchmarks/scale_tables.py`"


def test_every_table_has_a_place_on_the_page():
    assert sorted(re.findall(r"<!-- table: ([\w-]+) -->", PAGE.read_text())) == sorted(scale_tables.TABLES)


@pytest.mark.parametrize(
    ("value", "text"), [(0.04321, "43 ms"), (0.5, "500 ms"), (1.69, "1.7 s"), (24.0, "24 s"), (123.0, "120 s")]
)
def test_seconds_have_two_digits(value, text):
    assert scale_tables.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.25, "15 min"), (5.21, "5.2 h"), (20.3, "20 h"), (96.0, "4 days")])
def test_hours_are_told_in_the_unit_that_fits(value, text):
    assert scale_tables.hours(value) == text


def test_a_million_average_slides_as_float32_are_73_terabytes():
    # 17,840 patches x 1,024 values x 4 bytes = 73.07 MB a slide
    assert scale_tables.stored_bytes("float16, default codec") == pytest.approx(73.07e12 * 0.434, rel=1e-3)
