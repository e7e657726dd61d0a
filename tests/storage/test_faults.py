"""What a user is told when the store does not do what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist.errors import StorageError
from moe_dist.storage import Store
from moe_dist.storage.faults import explain
from tests.storage.moto_server import start_server


def test_a_store_that_works_passes_the_probe_and_stays_empty(s3: str) -> None:
    Store(f"{s3}/results").probe()
    assert Store(s3).list() == []


def test_a_missing_bucket_is_named(s3: str) -> None:
    with pytest.raises(StorageError, match="no such bucket") as caught:
        Store("s3://nobody-made-this/results").probe()
    assert "s3://nobody-made-this/results" in caught.value.message
    assert "make the bucket" in caught.value.remedy


def test_an_endpoint_that_does_not_answer_is_named(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached") as caught:
        Store(f"{s3}/results").probe()
    assert "AWS_ENDPOINT_URL" in caught.value.remedy


@pytest.fixture
def guarded(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that knows no users, and so refuses every key."""
    process, address = start_server(INITIAL_NO_AUTH_ACTION_COUNT="0")
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    yield s3
    process.terminate()
    process.wait(timeout=20)


def test_credentials_that_are_not_accepted_are_named(guarded: str) -> None:
    with pytest.raises(StorageError, match=r"credentials|denied") as caught:
        Store(f"{guarded}/results").probe()
    assert "AWS_ACCESS_KEY_ID" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("AWS Error ACCESS_DENIED during CreateMultipartUpload operation: no", "access is denied"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadBucket: x", "in another region"),
        ("curlCode: 28, Timeout was reached", "cannot be reached"),
    ],
)
def test_faults_of_real_services_are_recognised(text: str, reason: str) -> None:
    assert reason in explain(OSError(text), "s3://bucket/x", "write").message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"a\.tsv: there is no such file"):
        Store("memory://nowhere").download([("a.tsv", tmp_path / "a.tsv")])


def test_a_server_that_does_not_answer_is_no_missing_file() -> None:
    error = FileNotFoundError("http://127.0.0.1:9/a.tsv")
    error.__cause__ = OSError("Cannot connect to host 127.0.0.1:9")
    assert "cannot be reached" in explain(error, "http://127.0.0.1:9/a.tsv", "read").message


def test_no_error_shows_credentials() -> None:
    uri = "s3://me:hidden-word@bucket/x?region=eu&secret=other-word"
    error = explain(OSError(f"something odd at {uri} with hidden-word"), uri, "write")
    assert "odd" in error.message
    for secret in ("hidden-word", "other-word", "me:"):
        assert secret not in str(error)


def test_an_unknown_scheme_is_an_error_for_the_user() -> None:
    with pytest.raises(StorageError, match="nosuch"):
        Store("nosuch://bucket/x").probe()


def test_any_driver_of_fsspec_will_do() -> None:
    store = Store("memory://place/results")
    store.probe()
    store.at("deep").write("one", b"1")
    assert store.read("deep/one") == b"1"
    assert [entry.name for entry in store.list()] == ["deep/one"]
