"""Tars: as the webdataset package reads them, alone without a store, and made to harm."""

from __future__ import annotations

import gc
import gzip
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cfstore
from cfstore import IngestOptions, Store, StoreFormatError, StoreNotFoundError
from cfstore.errors import DamagedShardError, LeakageError
from cfstore.shards import stored_checks
from cfstore.shards.files import BLANK_DIGEST, sign
from cfstore.shards.tar_shard import read_shard, sample_key
from cfstore.tar_store import expand_braces

Make = Callable[..., Any]
SLIDES = ("plain", "with.dots.in", "with spaces", "Größe 100%", "with%2Edots")


@pytest.fixture
def store(tmp_path: Path, make_cohort: Make) -> Store:
    make_cohort(tmp_path / "h5", slides=SLIDES)
    lines = [f"{slide},{slide},{number},{number % 2}" for number, slide in enumerate(SLIDES)]
    (tmp_path / "h5" / "c.csv").write_text("\n".join(["slide_id,patient_id,time_months,event", *lines]))
    made = cfstore.open(tmp_path / "store", create=True)
    made.ingest(tmp_path / "h5", IngestOptions(encoder="uni", cohort="AA", dtype="float32"))
    return made


@pytest.fixture
def shard(tmp_path: Path, store: Store) -> Path:
    """One tar of all slides."""
    store.export(tmp_path / "tars")
    return tmp_path / "tars" / "000000.tar"


# --- the webdataset package ---------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_webdataset_reads_one_sample_per_slide_with_its_values_and_labels(tmp_path, store):
    package = pytest.importorskip("webdataset")
    store.export(tmp_path / "tars", shard_slides=2)
    urls = str(tmp_path / "tars" / "{000000..000002}.tar")
    samples = list(package.WebDataset(urls, shardshuffle=False).decode())
    assert len({sample["__key__"] for sample in samples}) == len(SLIDES)
    by_slide = {sample["json"]["slide_id"]: sample for sample in samples}
    assert set(by_slide) == set(SLIDES)
    for number, slide in enumerate(SLIDES):
        sample = by_slide[slide]
        assert sample["__key__"] == sample_key(slide)
        for scale, bag in store.slide(slide).bags.items():
            np.testing.assert_array_equal(sample[f"x{scale}.npy"], bag.features)
            np.testing.assert_array_equal(sample[f"coords_x{scale}.npy"], bag.coords)
        label = sample["json"]
        assert (label["patient_id"], label["time_months"], label["event"]) == (slide, number, number % 2 == 1)


def test_rows_start_at_multiples_of_4_kib(shard):
    _, extents, _ = read_shard(shard.parent, shard.name)
    assert {extent.byte_start % 4096 for extent in extents} == {0}


# --- tars alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..10}.tar", ["8.tar", "9.tar", "10.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{1..2}", ["a/1", "a/2", "b/1", "b/2"]),
        ("{x}.tar", ["{x}.tar"]),
        ("{000..002}-{0..1}.tar", [f"{a:03d}-{b}.tar" for a in range(3) for b in range(2)]),
    ],
)
def test_braces_are_expanded_as_webdataset_does(pattern, names):
    assert list(expand_braces(pattern)) == names
    braceexpand = pytest.importorskip("braceexpand")
    assert list(braceexpand.braceexpand(pattern)) == names


def test_a_folder_a_wildcard_a_brace_range_and_a_list_name_the_same_tars(tmp_path, store):
    store.export(tmp_path / "tars", shard_slides=2)
    folder = tmp_path / "tars"
    for pattern in (folder, f"{folder}/*.tar", f"{folder}/{{000000..000002}}.tar", sorted(folder.glob("*"))):
        opened = cfstore.open_tars(pattern)
        assert opened.cohort("AA") == store.cohort("AA")
        reader = opened.reader("uni", [5, 20], SLIDES)
        order = [slide for shard in opened.shard_order("uni", SLIDES) for slide in shard]
        streamed = [slide.slide_id for slide in reader.stream(order)]
        assert sorted(streamed) == sorted(SLIDES)


@pytest.mark.parametrize("pattern", ["{000000..000003}.tar", "nothing*.tar", "x.tar", "."])
def test_missing_tars_are_named(tmp_path, pattern, store):
    store.export(tmp_path / "tars" / "here", shard_slides=2)
    with pytest.raises(StoreNotFoundError, match="no tar file there"):
        cfstore.open_tars(str(tmp_path / "tars" / pattern))


def test_a_range_without_end_is_refused():
    with pytest.raises(StoreNotFoundError, match="more than"):
        cfstore.open_tars("{0..999999999999}.tar")


def test_two_tars_with_one_slide_are_refused(tmp_path, store, shard):
    store.export(tmp_path / "again", where="slide_id = 'plain'")
    with pytest.raises(StoreFormatError, match="slide plain of encoder uni is both in"):
        cfstore.open_tars([shard.parent, tmp_path / "again"])


def test_tars_that_disagree_about_a_patient_are_refused(tmp_path, make_cohort):
    stores = []
    for number in (1, 2):
        folder = tmp_path / f"h{number}"
        make_cohort(folder, slides=(f"p-{number}",))
        (folder / "c.csv").write_text(f"patient_id,time_months,event\np,{number},1\n")
        made = cfstore.open(tmp_path / f"s{number}", create=True)
        made.ingest(folder, IngestOptions(encoder="uni", cohort="AA"))
        made.export(tmp_path / f"t{number}")
        stores.append(tmp_path / f"t{number}")
    with pytest.raises(StoreFormatError, match="disagree about time_months"):
        cfstore.open_tars(stores)


def test_the_index_goes_with_its_store(shard):
    opened = cfstore.open_tars(shard)
    folder = opened.path
    assert folder.is_dir()
    del opened
    gc.collect()
    assert not folder.exists()
    code = f"import cfstore; s = cfstore.open_tars({str(shard)!r}); print(s.path)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).exists()


def test_labels_can_be_imported_beside_tars(tmp_path, shard):
    opened = cfstore.open_tars(shard)
    (tmp_path / "new.csv").write_text("patient_id,time_months,event,grade\nplain,5,1,3\n")
    opened.import_clinical(tmp_path / "new.csv", "AA")
    assert opened.sql("SELECT grade FROM patients WHERE patient_id = 'plain'").to_pylist() == [{"grade": 3}]


def rewritten(shard: Path, change: Callable[[dict[str, Any]], None], slide: str = "plain") -> Path:
    """The tar with one sample's JSON changed and signed again, as only a liar would."""
    made = shard.with_name("changed.tar")
    with tarfile.open(shard) as old, tarfile.open(made, "w", format=tarfile.GNU_FORMAT) as new:
        for member in old:
            data = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == f"{sample_key(slide)}.json":
                content = json.loads(data)
                content["cfstore"]["digest"] = BLANK_DIGEST
                change(content)
                data = sign(json.dumps(content)).encode()
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return made


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name in path[:-1]:
            content = content[int(name)] if name.isdecimal() else content[name]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("cfstore", "shard", "encoder", value="../../x"), "encoder"),
        (put("cfstore", "shard", "dtype", value="object"), "dtype"),
        (put("cfstore", "shard", "dim", value=-8), "dim"),
        (put("cfstore", "shard", "dim", value="8"), "dim"),
        (put("cfstore", "shard", "format_version", value=99), "upgrade"),
        (put("cfstore", "slide", "slide_id", value="../plain"), "slide_id"),
        (put("cfstore", "slide", "slide_id", value="other"), "slide_id"),
        (put("cfstore", "slide", "bags", value=7), "record of sample"),
        (put("cfstore", "slide", "bags", "0", "n_patches", value=10**15), "n_patches is 1000000000000000"),
        (put("cfstore", "slide", "bags", "0", "n_patches", value=10**9), "should hold"),
        (put("cfstore", "slide", "bags", "0", "n_patches", value="many"), "n_patches"),
        (put("cfstore", "slide", "bags", "0", "scale", value=7), "bags"),
        (put("cfstore", "slide", "bags", "0", "max_abs_error", value=[1]), "max_abs_error"),
        (put("cohort", value="../../etc"), "cohort"),
        (put("patient", "age", value={"a": 1}), "no label"),
        (put("patient", "age", value="old"), "age of patients"),
        (put("patient", "patient_id", value="x"), "no label"),
        (put("splits", value={"s": {"../0": "train"}}), "fold"),
        (put("splits", value={"../s": {"0": "train"}}), "split"),
        (put("splits", value={"s": {"0": "everything"}}), "fold"),
    ],
)
def test_a_record_that_lies_is_refused(shard, change, message):
    with pytest.raises(StoreFormatError, match=message):
        cfstore.open_tars(rewritten(shard, change))


def test_a_patient_on_two_sides_of_a_fold_is_refused(shard):
    changed = rewritten(shard, put("splits", value={"s": {"0": "train"}}))
    same = rewritten_again(changed, put("patient_id", value="plain"), put("splits", value={"s": {"0": "val"}}))
    with pytest.raises((LeakageError, StoreFormatError), match=r"another part|disagree"):
        cfstore.open_tars(same)


def rewritten_again(shard: Path, *changes: Callable[[dict[str, Any]], None]) -> Path:
    def change(content: dict[str, Any]) -> None:
        for one in changes:
            one(content)

    return rewritten(shard.rename(shard.with_name("before.tar")), change, "with spaces")


# --- made to harm -------------------------------------------------------------------------------


def header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, linkname: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, linkname
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 512)


def npy(descr: str, shape: str, data: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


END = b"\0" * 1024
HOSTILE = {
    "symbolic link": (header("a.x20.npy", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "symbolic link"),
    "hard link": (header("a.x20.npy", kind=tarfile.LNKTYPE, linkname="../b"), "hard link"),
    "device": (header("a.x20.npy", kind=tarfile.CHRTYPE), "device"),
    "pipe": (header("a.json", kind=tarfile.FIFOTYPE), "pipe"),
    "folder": (header("a.json/", kind=tarfile.DIRTYPE), "folder"),
    "sparse file": (header("a.x20.npy", kind=tarfile.GNUTYPE_SPARSE), "sparse"),
    "global PAX header": (header("g", kind=tarfile.XGLTYPE), "unknown kind"),
    "parent folder": (header("../../etc/passwd.json"), "no name that cfstore gives"),
    "absolute name": (header("/etc/passwd.json"), "no name that cfstore gives"),
    "terabyte": (header("a.x20.npy", 10**12), "declares 1,000,000,000,000 bytes"),
    "huge JSON": (header("a.json", 10**12), "declares"),
    "long name bomb": (header("././@LongLink", 1 << 40, tarfile.GNUTYPE_LONGNAME), "declares"),
    "PAX bomb": (header("x", 1 << 40, tarfile.XHDTYPE), "declares"),
    "long name": (header("././@LongLink", 1 << 20, tarfile.GNUTYPE_LONGNAME) + bytes(1 << 20), "extended header of"),
    "PAX size": (header("x", 12, tarfile.XHDTYPE) + padded(b"12 size=999\n"), "size of its own"),
    "PAX sparse": (header("x", 22, tarfile.XHDTYPE) + padded(b"22 GNU.sparse.major=1\n"), "size of its own"),
    "PAX nonsense": (header("x", 9, tarfile.XHDTYPE) + padded(b"9999 a=b\n"), "no records"),
    "PAX endless": (header("x", 9, tarfile.XHDTYPE) + padded(b"0 a=bcde\n"), "no records"),
    "JSON of another": (header("a.json", 2) + padded(b"{}"), "no record of cfstore"),
    "nested JSON": (header("a.json", 100_000) + padded(b"[" * 100_000), "no record of cfstore"),
    "long number": (header("a.json", 100_000) + padded(b"1" * 100_000), "no record of cfstore"),
    "no JSON": (header("a.jpg", 3) + padded(b"abc"), "make shards with `cfstore export`"),
    "twice": (header("a.json") * 2, "twice in one sample"),
    "too many members": (b"".join(header(f"a.{i}") for i in range(70)), "65th member"),
    "no header": (b"\x07" * 512, "no tar header"),
    "something after the end": (END + b"more" + bytes(508), "follow the end"),
    "nothing": (b"", "no sample"),
}  # fmt: skip


def opened_with_little_memory(path: Path, spare: int = 300 << 20) -> str:
    code = (
        "import resource, sys, cfstore\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + int(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "try:\n    cfstore.open_tars(sys.argv[1])\nexcept cfstore.StoreError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(spare)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", HOSTILE)
def test_a_tar_made_to_harm_is_refused_by_name(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.tar"
    path.write_bytes(content + END)
    with pytest.raises(StoreFormatError, match=message) as caught:
        cfstore.open_tars(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_declared_gigabyte_that_is_there_is_not_taken_into_memory(tmp_path, kind):
    path = tmp_path / "bad.tar"
    with path.open("wb") as file:
        file.write(header("a.json", 4 << 30, kind))
        file.seek(4 << 30, 1)
        file.write(END)
    assert str(path) in opened_with_little_memory(path)


class Mine:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    "member",
    [
        npy("'|O'", "(1, 8)", pickle.dumps(Mine())),
        npy("'<f4'", "(10000000000000, 8)", b"\0" * 32),
        npy("'<f4'", "(-2, -8)", b"\0" * 64),
        npy("'>f4'", "(1, 8)", b"\0" * 32),
        npy("'<f8'", "(1, 8)", b"\0" * 64),
        npy("(" * 900 + ")" * 900, "(1, 8)"),
        npy("'<f4'", "(1, 8)" + " " * 20_000, b"\0" * 32),
        npy("__import__('os').system('true')", "(1, 8)"),
        npy("'nonsense'", "(1, 8)"),
        pickle.dumps(Mine()),
        b"",
    ],
    ids=[
        "pickle",
        "too large",
        "negative",
        "big-endian",
        "float64",
        "nested",
        "long",
        "code",
        "dtype",
        "bare",
        "empty",
    ],
)
def test_an_array_that_is_not_what_the_record_says_is_refused_without_unpickling(shard, member, capsys):
    made = shard.with_name("bad.tar")
    with tarfile.open(shard) as old, tarfile.open(made, "w", format=tarfile.GNU_FORMAT) as new:
        for entry in old:
            data = member if entry.name == "plain.x5.npy" else old.extractfile(entry).read()  # type: ignore[union-attr]
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    with pytest.raises(DamagedShardError, match=r"plain\.x5\.npy|x5\.npy should hold"):
        cfstore.open_tars(made)
    assert capsys.readouterr().out == ""


def test_a_tar_cut_short_is_refused_or_whole(shard):
    whole = shard.read_bytes()
    expected = read_shard(shard.parent, shard.name)[:2]
    cut = shard.with_name("cut.tar")
    for size in sorted({*range(0, len(whole), 1531), *range(0, len(whole), 4096), len(whole) - 1, len(whole) - 512}):
        cut.write_bytes(whole[:size])
        if size < len(whole) - 512:
            with pytest.raises(DamagedShardError, match=re.escape(str(cut))):
                read_shard(cut.parent, cut.name)
        else:
            assert read_shard(cut.parent, cut.name)[:2] == (replace(expected[0], shard=cut.name), expected[1])


@pytest.mark.parametrize("at", [3, 100, 150, 300, 512 + 20, 512 + 4000])
def test_a_changed_byte_of_a_header_never_goes_unseen(shard, at):
    data = bytearray(shard.read_bytes())
    data[at] ^= 0x15
    shard.write_bytes(bytes(data))
    try:
        opened = cfstore.open_tars(shard)
    except StoreFormatError:
        return
    shard_name = opened.sql("SELECT DISTINCT shard FROM bags").to_pylist()[0]["shard"]
    assert any(check.look() for check in stored_checks(opened.path, shard_name))


def test_a_changed_label_is_refused(shard):
    shard.write_bytes(shard.read_bytes().replace(b'"time_months": 4.0', b'"time_months": 9.0'))
    with pytest.raises(DamagedShardError, match="changed after it was written"):
        cfstore.open_tars(shard)


def test_a_compressed_tar_is_refused_with_its_remedy(shard):
    packed = shard.with_name("packed.tar")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(StoreFormatError, match=r"compressed with gzip; .* unpack it to \.tar"):
        cfstore.open_tars(packed)


def test_a_tar_written_again_by_other_programs_still_reads(shard, store):
    again = shard.with_name("again.tar")
    with tarfile.open(shard) as old, tarfile.open(again, "w", format=tarfile.PAX_FORMAT) as new:
        for member in old:
            member.mtime = 1.5
            new.addfile(member, old.extractfile(member))
    opened = cfstore.open_tars(again)
    for slide in SLIDES:
        np.testing.assert_array_equal(opened.slide(slide).bags[20].features, store.slide(slide).bags[20].features)


def test_long_slide_ids_survive(tmp_path, make_cohort):
    slide = "ü" * 100
    make_cohort(tmp_path / "h5", slides=(slide,))
    made = cfstore.open(tmp_path / "s", create=True)
    made.ingest(tmp_path / "h5")
    made.export(tmp_path / "t")
    assert cfstore.open_tars(tmp_path / "t").slide(slide).bags[20].n_patches == 6
