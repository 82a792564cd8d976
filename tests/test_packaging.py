"""What a user installs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: building in place would leave folders behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("cfstore", "cftrain", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((copy / "dist").glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_exactly_three_top_level_packages(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"cfstore", "cftrain", "cfkernels"}


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for base, folder in (("cfstore", ROOT), ("cftrain", ROOT), ("cfkernels", ROOT / "kernels")):
        for path in (folder / base).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md":
                assert str(path.relative_to(folder)) in held


@pytest.mark.slow
def test_the_wheel_asks_for_open_ranges_and_pins_nothing(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert any("torch>=2.10" in line for line in required)
    assert "==" not in "".join(line.split(";")[0] for line in required)


def test_the_repository_holds_nothing_that_everybody_would_download_for_ever():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git repository")
    large = [name for name in done.stdout.split("\0") if name and (ROOT / name).stat().st_size > 500_000]
    assert large == []
