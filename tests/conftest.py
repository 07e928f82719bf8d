"""Fixtures of all tests: a local S3 service, and a store on a disk and in S3."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from infra.store import Store

# The same examples in every run, and none too slow. `pytest --hypothesis-profile default` looks
# for others.
settings.load_profile("ci")

# A local Ray cluster of a test needs no token.
os.environ["RAY_AUTH_MODE"] = "disabled"

_BUCKET = "fourm-tests"


@pytest.fixture(scope="session")
def s3_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of an empty bucket in an S3 service of this process; the environment points at it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "tests")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("FOURM_CACHE", str(tmp_path_factory.mktemp("cache")))
        boto3.client("s3").create_bucket(Bucket=_BUCKET)
        yield f"s3://{_BUCKET}"
        server.stop()


@pytest.fixture(params=["file", "s3"])
def tmp_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, once in a folder and once in S3."""
    if request.param == "file":
        return Store(str(tmp_path / "store"))
    return Store(f"{request.getfixturevalue('s3_url')}/{uuid.uuid4().hex}")
