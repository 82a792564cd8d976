"""Slides go out of a store and the space they took is freed; what stays is bit for bit the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cfstore import IngestOptions, SlideNotFoundError, Store
from cfstore.catalog import read_removed
from cfstore.cli import main
from cfstore.errors import DamagedShardError
from cfstore.shards import published_shards

Make = Callable[..., Any]
KINDS = {
    "zarr": IngestOptions(),
    "plain": IngestOptions(codec="none"),
    "int8": IngestOptions(dtype="int8"),
    "tar": IngestOptions(format="webdataset"),
}
KEPT = "SELECT * EXCLUDE (shard, row_start, byte_start, byte_length) FROM bags ORDER BY ALL"


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, tmp_path: Path, store: Store, make_cohort: Make) -> Store:
    """A store of three shards of a kind, two slides each."""
    for number, slides in enumerate((("a", "b"), ("c", "d"), ("e", "f"))):
        make_cohort(tmp_path / f"f{number}", slides)
        store.ingest(
            tmp_path / f"f{number}", KINDS[request.param].__class__(**{**vars(KINDS[request.param]), "encoder": "uni"})
        )
    return store


def ids(store: Store) -> list[str]:
    return store.sql("SELECT slide_id FROM slides ORDER BY 1")["slide_id"].to_pylist()


def values(store: Store) -> dict[tuple[str, int], tuple[bytes, bytes]]:
    return {
        (slide_id, scale): (bag.features.tobytes(), bag.coords.tobytes())
        for slide_id in ids(store)
        for scale, bag in store.slide(slide_id).bags.items()
        if bag.coords is not None
    }


def test_a_removed_slide_is_gone_and_the_others_are_as_before(kept: Store) -> None:
    before = values(kept)
    assert kept.remove(["b", "c"]) == 6
    assert ids(kept) == ["a", "d", "e", "f"]
    assert values(kept) == {key: value for key, value in before.items() if key[0] not in "bc"}
    with pytest.raises(SlideNotFoundError):
        kept.slide("b")
    assert len(published_shards(kept.path)) == 3


def test_compaction_frees_the_space_and_changes_no_value(kept: Store) -> None:
    kept.remove(["b", "c"])
    before, rows = values(kept), kept.sql(KEPT).to_pylist()
    report = kept.compact()
    assert (report.n_shards_before, report.n_shards_after, report.n_slides_rewritten) == (3, 1, 4)
    assert report.bytes_after < report.bytes_before
    assert values(kept) == before
    assert kept.sql(KEPT).to_pylist() == rows
    assert kept.verify(deep=True).findings == ()
    assert read_removed(kept.path) == set()
    again = kept.compact()
    assert (again.n_slides_rewritten, again.bytes_before) == (0, report.bytes_after)


def test_a_removed_slide_that_is_ingested_again_is_back(tmp_path: Path, kept: Store) -> None:
    before = values(kept)
    options = kept.sql("SELECT DISTINCT dtype, codec, split_part(shard, '.', -1) AS kind FROM bags").to_pylist()[0]
    kept.remove(["a"])
    form: Any = "webdataset" if options["kind"] == "tar" else "zarr"
    codec = None if form == "webdataset" else options["codec"]
    again = IngestOptions(encoder="uni", dtype=options["dtype"], codec=codec, format=form)
    assert kept.ingest(tmp_path / "f0", again).n_slides == 1
    assert values(kept) == before
    kept.compact()
    assert values(kept) == before
    assert kept.verify(deep=True).findings == ()


def test_removing_everything_leaves_an_empty_store(kept: Store) -> None:
    kept.remove(ids(kept))
    report = kept.compact()
    assert (report.n_shards_after, report.bytes_after) == (0, 0)
    assert ids(kept) == []
    assert kept.verify().findings == ()


def test_a_damaged_shard_of_removed_slides_can_be_dropped(kept: Store) -> None:
    shard = kept.path / published_shards(kept.path)[0]
    path = shard if shard.is_file() else shard / "zarr.json"
    path.write_bytes(b"rubbish")
    kept.remove(["a", "b"])
    kept.compact()
    assert kept.verify().findings == ()
    assert ids(kept) == ["c", "d", "e", "f"]


def test_compaction_refuses_damaged_rows_and_leaves_the_shard(kept: Store) -> None:
    name = published_shards(kept.path)[0]
    shard = kept.path / name
    path = shard if shard.is_file() else shard / "features/c/0/0"
    [row] = kept.sql("SELECT byte_start FROM bags WHERE slide_id = 'a' AND scale = 20").to_pylist()
    content = bytearray(path.read_bytes())
    content[row["byte_start"]] ^= 1
    path.write_bytes(content)
    kept.remove(["b"])
    with pytest.raises(DamagedShardError, match=r"slide a\b.*restore the shard"):
        kept.compact()
    assert shard.exists()
    assert ids(kept) == ["a", "c", "d", "e", "f"]
    assert not list(kept.path.rglob(".writing-*"))


def test_nothing_is_removed_when_one_name_is_unknown(kept: Store) -> None:
    with pytest.raises(SlideNotFoundError, match=r"zz: not in .*; nothing was removed"):
        kept.remove(["a", "zz"])
    with pytest.raises(SlideNotFoundError, match=r"a: not in .* from encoder conch; nothing was removed"):
        kept.remove(["a"], encoder="conch")
    assert len(ids(kept)) == 6


def test_only_the_named_encoder_loses_its_bags(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a", "b"))
    make_cohort(tmp_path / "conch", ("a", "b"), scales=(20,))
    store.ingest(tmp_path / "uni")
    store.ingest(tmp_path / "conch")
    result = CliRunner().invoke(main, ["rm", "a.svs", "--encoder", "conch", "--store", str(store.path)])
    assert result.exit_code == 0, result.output
    assert "removed    a\n" in result.output
    assert "1 slides (1 bags) removed; `cfstore compact` frees their space" in result.output
    rows = store.sql("SELECT encoder, slide_id, count(*) FROM bags GROUP BY ALL ORDER BY ALL").to_pylist()
    assert [tuple(row.values()) for row in rows] == [("conch", "b", 1), ("uni", "a", 3), ("uni", "b", 3)]


def test_the_commands_print_one_json_object(tmp_path: Path, store: Store, make_cohort: Make) -> None:
    make_cohort(tmp_path / "uni", ("a", "b"))
    store.ingest(tmp_path / "uni")
    for arguments, expected in (
        (["rm", "b.h5", "b"], {"slides": ["b"], "encoder": None, "n_bags": 3}),
        (["compact"], {"n_shards_before": 1, "n_shards_after": 1, "n_slides_rewritten": 1}),
        (["reindex"], {"n_shards": 1, "n_slides": 1, "n_bags": 3, "gone": []}),
        (["verify"], {"n_shards": 1, "n_slides": 1, "n_bags": 3, "findings": []}),
    ):
        result = CliRunner().invoke(main, [*arguments, "--json", "--store", str(store.path)])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout).items() >= expected.items()
    unknown = CliRunner().invoke(main, ["rm", "zz", "--store", str(store.path)])
    assert (unknown.exit_code, len(unknown.output.splitlines())) == (1, 1)


def test_a_reader_that_was_open_reads_on_after_a_compaction(kept: Store) -> None:
    scales = (5, 10, 20)
    reader = kept.reader("uni", scales, ["a", "d", "e"], with_coords=True)
    before = {s: reader.read(s).bags[20].features.copy() for s in ("a", "d")}
    kept.remove(["b", "c"])
    kept.compact()
    for slide_id, features in before.items():
        np.testing.assert_array_equal(reader.read(slide_id).bags[20].features, features)
    assert reader.read("e").bags[5].n_patches == kept.slide("e").bags[5].n_patches
