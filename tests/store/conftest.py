"""An S3 server on loopback, and a way to it on which things go wrong, for tests of stores on object storage."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from faulty_proxy import FaultyProxy

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of a real S3-protocol server on loopback (moto)."""
    pytest.importorskip("obstore", reason="needs the extra [remote]")
    server = pytest.importorskip("moto.server", reason="needs moto[server]").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0, verbose=False
    )
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the server; the environment leads to it, with credentials."""
    with FaultyProxy(f"127.0.0.1:{s3_port}") as proxy:
        for name, value in {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def bucket_url(s3: FaultyProxy, s3_port: int) -> str:
    """The address of a folder of an empty bucket of its own."""
    import boto3

    name = f"bucket{next(_numbers)}"  # no "-": the client of gs:// writes it as %2D, which moto does not undo
    client = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3_port}",
        aws_access_key_id="tests",
        aws_secret_access_key="tests",  # noqa: S106 - the server takes any
        region_name="us-east-1",
    )
    client.create_bucket(Bucket=name)
    client.close()
    return f"s3://{name}/cohorts/store"


@pytest.fixture
def slow_cohort(tmp_path: Path) -> Path:
    """Twelve slides of three scales that take a moment each to read: compressed in tiny chunks."""
    rng, folder = np.random.default_rng(0), tmp_path / "uni"
    for i in range(12):
        for scale in (5, 10, 20):
            path = folder / f"x{scale}" / "h5_files" / f"s{i:02d}.h5"
            path.parent.mkdir(parents=True, exist_ok=True)
            n = 12 * scale + 7 * i
            rows = rng.normal(size=(n, 64)).astype(np.float32)
            with h5py.File(path, "w") as file:
                file.create_dataset("features", data=rows, chunks=(1, 1), compression="gzip", compression_opts=1)
                file["coords"] = rng.integers(0, 90_000, (n, 2)).astype(np.int32)
    return folder


@pytest.fixture(autouse=True)
def _own_mirrors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mirrors of this test's stores are nobody else's."""
    if {"s3", "bucket_url"} & set(request.fixturenames):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))
    monkeypatch.delenv("CFSTORE_CACHE", raising=False)
