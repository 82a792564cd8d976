"""Benchmarks are not imported by anything else: at least they start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(
    path for path in (Path(__file__).parents[1] / "benchmarks").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_says_what_it_does(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    if "No module named" in done.stderr and any(extra in done.stderr for extra in ("tensorstore", "zarrs")):
        pytest.skip("needs the extra [bench]")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
