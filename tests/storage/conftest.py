"""An S3 server of the test's own: moto, on a free port of the loopback interface."""

from __future__ import annotations

import os
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.conftest import tiny_bert, tiny_settings, write_recipe
from tests.storage.moto_server import start_server

__all__ = ["tiny_bert", "tiny_settings", "write_recipe"]

REGION = "us-east-1"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a running S3 server."""
    pytest.importorskip("moto")
    process, address = start_server()
    yield address
    process.terminate()
    process.wait(timeout=20)


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket; credentials and endpoint are in the environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-that-is-planted")
    monkeypatch.setenv("AWS_REGION", REGION)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("MOE_DIST_SCRATCH", str(tmp_path / "scratch"))
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")
    urllib.request.urlopen(request, timeout=30).close()
    return f"s3://{bucket}"
