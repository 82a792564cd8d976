"""A full disk and a read-only one: one clear line, the store whole, and the same command finishes later.

On a real small filesystem (tmpfs), where this machine lets one be mounted.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import cfstore
from cfstore import Store
from cfstore.cli import main
from cfstore.errors import StoreWriteError

Make = Callable[..., Any]
KIB = 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no filesystem can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def kept(tmp_path: Path, disk: Path, make_cohort: Make) -> Store:
    store = cfstore.open(disk / "store", create=True)
    for slides in (("a", "b"), ("c", "d")):
        make_cohort(tmp_path / slides[0] / "uni", slides, dim=64)
        store.ingest(tmp_path / slides[0] / "uni")
    make_cohort(tmp_path / "new" / "big", tuple(f"n{i}" for i in range(6)), dim=1024)
    (tmp_path / "t.csv").write_text("case_id,slide_id,survival_months,censorship\np1,a.svs,3,0\n")
    return store


def fill(disk: Path, left: int) -> None:
    free = shutil.disk_usage(disk).free
    with (disk / "filler").open("wb") as file:
        file.write(b"\0" * max(0, free - left))


def values(store: Store) -> dict[str, bytes]:
    ids = store.sql("SELECT slide_id FROM slides ORDER BY 1")["slide_id"].to_pylist()
    return {slide_id: store.slide(slide_id).bags[20].features.tobytes() for slide_id in ids}


COMMANDS = {
    "ingest": ["ingest", "{tmp}/new/big", "--jobs", "1"],
    "rm": ["rm", "b"],
    "compact": ["compact"],
    "reindex": ["reindex"],
    "derive": ["derive", "nearest8-20x", "mean-20x", "--jobs", "1"],
    "clinical": ["clinical", "{tmp}/t.csv", "--cohort", "uni"],
}


def call(name: str, tmp_path: Path, store: Store) -> Any:
    words = [word.format(tmp=tmp_path) for word in COMMANDS[name]]
    return CliRunner().invoke(main, [*words, "--store", str(store.path)])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_said_in_one_line_and_the_command_finishes_when_there_is_room(
    command: str, tmp_path: Path, disk: Path, kept: Store
) -> None:
    before, failed = values(kept), 0
    for left in (0, 4, 16, 64, 300, 1000, 1800, 2600, 3400):
        fill(disk, left * KIB)
        result = call(command, tmp_path, kept)
        if result.exit_code:
            failed += 1
            assert isinstance(result.exception, SystemExit), (left, repr(result.exception))
            message = result.stderr.splitlines()[-1]
            assert message.startswith("Error: "), message
            assert str(kept.path) in message
            assert "space" in message
            now = values(kept)
            assert all(now[slide_id] == before[slide_id] for slide_id in set(before) - {"b"})
            assert command == "rm" or before.items() <= now.items()
        (disk / "filler").unlink()
        if not result.exit_code:
            break
    assert failed
    result = call(command, tmp_path, kept)
    assert result.exit_code == 0, result.output
    assert kept.verify(deep=True).findings == ()
    left_over = [*kept.path.rglob(".writing-*"), *kept.path.glob(".catalog*"), *kept.path.glob("tables/.*")]
    assert not left_over
    after = values(kept)
    if command == "ingest":
        assert len(after) == len(before) + 6
    assert ("b" in after) == (command != "rm")


def test_a_read_only_disk_can_be_read_verified_and_says_what_to_do(tmp_path: Path, disk: Path, kept: Store) -> None:
    before = values(kept)
    remount = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True, check=False)
    if remount.returncode:
        pytest.skip(f"cannot be mounted read-only: {remount.stderr.strip()}")
    store = cfstore.open(kept.path)
    assert values(store) == before
    reader = store.reader("uni", [5, 20], ["a", "c"])
    assert [slide.slide_id for slide in reader.stream(["c", "a"])] == ["c", "a"]
    for words in (["sql", "SELECT * FROM bags"], ["info"], ["show", "a"], ["verify", "--deep"]):
        result = CliRunner().invoke(main, [*words, "--store", str(store.path)])
        assert result.exit_code == 0, result.output
    for command in COMMANDS:
        result = call(command, tmp_path, store)
        assert result.exit_code == 1
        assert "cannot write to the store (Read-only file system); check its permissions" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    with pytest.raises(StoreWriteError):
        store.remove(["a"])
    assert os.statvfs(disk).f_flag & os.ST_RDONLY
    assert np.frombuffer(values(store)["a"], np.float16).size


# -- answers written to a file -------------------------------------------------------------------

FORMATS = ("table", "csv", "json", "parquet")


@pytest.mark.parametrize("form", FORMATS)
def test_an_answer_that_finds_no_room_is_said_in_one_line_that_names_the_file(form: str, store: Store) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    words = ["sql", "SELECT * FROM bags", "--format", form, "-o", "/dev/full", "--store", str(store.path)]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert result.stderr.startswith("Error: /dev/full: cannot be written (No space left on device)")


@pytest.mark.parametrize("form", FORMATS)
def test_no_part_of_an_answer_stays_where_there_was_no_room_for_all_of_it(
    form: str, tmp_path: Path, store: Store, disk: Path
) -> None:
    fill(disk, 64 * KIB)
    out = disk / "answer"
    query = "SELECT md5(n::VARCHAR) AS one, md5((-n)::VARCHAR) AS other FROM range(20000) AS t(n)"
    result = CliRunner().invoke(main, ["sql", query, "--format", form, "-o", str(out), "--store", str(store.path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {out}: cannot be written (No space left on device)")
    assert not out.exists()


def test_an_answer_to_a_folder_that_is_not_there_is_said_in_one_line(tmp_path: Path, store: Store) -> None:
    out = tmp_path / "missing" / "answer.csv"
    words = ["sql", "SELECT 1 AS one", "--format", "csv", "-o", str(out), "--store", str(store.path)]
    result = CliRunner().invoke(main, words)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert result.stderr.startswith(f"Error: {out}: cannot be written (No such file or directory)")
