"""Ingest and derive into a bucket on two Ray nodes that share the source folder and nothing else; one is killed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import Cluster, Node, opened_by, two_nodes
from remote_writers import Executioner, download, objects
from test_ray import bags, until

import cfstore
from cfstore import Derivation, Store

COUNTS = ("n_slides", "n_bags", "n_without_coords", "n_present", "problems", "source_bytes")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]  # one cluster at a time, for all


@pytest.fixture(scope="module")
def server(s3_port: int) -> Iterator[Executioner]:
    """In front of the server, for the nodes too: it lets PUTs through one by one, as conditions need it."""
    with Executioner(f"127.0.0.1:{s3_port}") as proxy:
        proxy.aim(-1, "before")
        yield proxy


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the nodes' own $TMPDIRs."""
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def cluster(server: Executioner, places: Path) -> Iterator[Cluster]:
    def variables(name: str) -> dict[str, str]:
        (places / name).mkdir()
        return {
            "TMPDIR": str(places / name),
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": f"of-{name}",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    with two_nodes(variables=variables) as made:
        yield made


@pytest.fixture
def url(bucket_url: str, server: Executioner, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    return bucket_url


def sessions(places: Path) -> dict[str, set[str]]:
    """By node, the folders that stand for stores in its $TMPDIR."""
    return {path.name: {found.name for found in path.glob("*/session-*/")} for path in places.iterdir()}


def shards_of(port: int, url: str) -> set[str]:
    return {"/".join(key.split("/")[:3]) for key in objects(port, url, "features/")}


def kill_while_it_writes(doomed: Node, port: int, url: str, was_writing: list[str]) -> None:
    """When three shards are in the bucket and the node has begun another."""
    until(lambda: len(shards_of(port, url)) >= 3)
    until(lambda: opened_by(doomed.processes, "/.writing-"))
    was_writing.extend(opened_by(doomed.processes, "/.writing-"))
    doomed.kill()


def copied(port: int, url: str, path: Path) -> Store:
    """What the catalog in the bucket names, as Amazon's client gets it, every byte of it whole."""
    assert download(port, url, path)
    store = Store(path)
    assert store.verify(deep=True).findings == ()
    return store


def test_a_node_is_killed_half_way_and_the_bucket_holds_what_one_machine_writes_into_a_folder(
    cluster: Cluster, places: Path, slow_cohort: Path, url: str, s3_port: int, tmp_path: Path
) -> None:
    local, store = (cfstore.open(place, create=True) for place in (tmp_path / "local", url))
    expected = local.ingest(slow_cohort)
    doomed, was_writing, seen = cluster.second(), [], []  # type: Node, list[str], list[tuple[int, int]]
    killer = threading.Thread(target=kill_while_it_writes, args=(doomed, s3_port, url, was_writing))
    killer.start()
    report = store.ingest(
        slow_cohort, engine="ray", address=cluster.address, jobs=12, progress=lambda *step: seen.append(step)
    )
    killer.join()
    assert was_writing
    assert all(path.startswith(str(places / "node0")) for path in was_writing)
    assert not doomed.is_alive()
    assert report.n_restarted >= 1
    assert [getattr(report, name) for name in COUNTS] == [getattr(expected, name) for name in COUNTS]
    assert report.n_shards == 12
    assert seen == [(i, 12) for i in range(1, 13)]
    left = sessions(places)
    assert left["head"] == set()
    assert left["node0"]  # of the dead; the next session there sweeps it

    found = copied(s3_port, url, tmp_path / "copy")
    assert bags(found) == bags(local) != []
    for slide in sorted({row["slide_id"] for row in bags(local)}):
        for scale, bag in local.slide(slide).bags.items():
            assert bag.features.tobytes() == found.slide(slide).bags[scale].features.tobytes()
    assert store.ingest(slow_cohort, engine="ray", address=cluster.address).n_present == 12

    wanted = [Derivation.mean(20), Derivation.nearest(10)]
    cluster.second()
    derived = store.derive(wanted, engine="ray", address=cluster.address, jobs=3)
    one = local.derive(wanted)
    assert (derived.done, derived.excluded) == (one.done, one.excluded)
    listed = "SELECT slide_id, derivation, digest, source FROM derived ORDER BY ALL"
    found = copied(s3_port, url, tmp_path / "derived")
    assert found.sql(listed).to_pylist() == local.sql(listed).to_pylist() != []
