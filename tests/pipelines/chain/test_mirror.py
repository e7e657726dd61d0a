"""What the driver keeps on its own machine of results that lie at a URI."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from moe_dist.metric_log import MetricTail
from moe_dist.storage import Store
from pipelines.chain.fingerprints import path_digest
from pipelines.chain.mirror import MirroredFiles


@pytest.fixture
def uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOE_DIST_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setattr("pipelines.chain.mirror.SMALL_BYTES", 100)
    monkeypatch.setattr("pipelines.chain.mirror.SYNC_INTERVAL_S", 0.01)
    return f"memory://{uuid.uuid4().hex}/run"


def write_model(directory: Path) -> None:
    directory.mkdir(parents=True)
    (directory / "weights").write_bytes(b"w" * 1000)
    files = {"weights": {"sha256": "abc", "bytes": 1000}}
    (directory / "manifest.json").write_text(json.dumps({"files": files}))


def open_mirror(uri: str) -> MirroredFiles:
    files = MirroredFiles(uri)
    files.prepare("test")
    return files


def test_a_published_stage_is_known_elsewhere_before_its_model_is_fetched(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_mirror(uri)
    with first.opened():
        stage = first.root / "adapt"
        write_model(stage / "model")
        (stage / "stage.json").write_text("{}")
        first.publish(stage)
        digest = first.digest(stage / "model")
        assert first.address(stage / "model") == f"{uri}/adapt/model"
        (first.root / "report.json").write_text("[]")
    assert not (first.root / "adapt").exists()
    assert Store(uri).read("report.json") == b"[]"

    monkeypatch.setenv("MOE_DIST_SCRATCH", str(tmp_path / "elsewhere"))
    second = open_mirror(uri)
    with second.opened():
        model = second.root / "adapt" / "model"
        assert (second.root / "adapt" / "stage.json").exists()
        assert not (model / "weights").exists()
        assert second.digest(model) == digest
        assert (second.fetch(model) / "weights").read_bytes() == b"w" * 1000
        assert path_digest(model) == digest

        Store(uri).delete(["adapt/model/weights"])
        second.received(second.root / "adapt")
        (model / "weights").unlink()
        with pytest.raises(FileNotFoundError):
            second.digest(model)


def test_the_result_of_a_stage_goes_up_last(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    upload = Store.upload

    def noted(store: Store, pairs: list[tuple[Path, str]]) -> None:
        sent.extend(name for _, name in pairs)
        upload(store, pairs)

    monkeypatch.setattr(Store, "upload", noted)
    files = open_mirror(uri)
    write_model(files.root / "adapt" / "model")
    for name in ("stage.json", "zoo.png"):
        (files.root / "adapt" / name).write_text("x")
    files.publish(files.root)
    assert sent[-2:] == ["adapt/model/manifest.json", "adapt/stage.json"]
    files.publish(files.root)
    assert len(sent) == 4


def test_moves_and_removals_happen_in_the_store_too(uri: str) -> None:
    files = open_mirror(uri)
    stage, previous = files.root / "adapt", files.root / ".adapt.previous"
    write_model(stage / "model")
    files.publish(files.root)
    stage.rename(previous)
    files.moved(stage, previous)
    names = [entry.name for entry in Store(uri).list()]
    assert names == [".adapt.previous/model/manifest.json", ".adapt.previous/model/weights"]
    files.publish(files.root)
    assert files.digest(previous / "model")
    files.removed(previous / "model" / "weights")
    assert [entry.name for entry in Store(uri).list()] == names[:1]
    files.removed(previous)
    assert Store(uri).list() == []


def test_a_metric_log_grows_in_place_and_shrinks_by_replacement(uri: str) -> None:
    files, store = open_mirror(uri), Store(uri)
    log = files.root / "distill" / "metrics.jsonl"
    tail = MetricTail(log)

    def line(step: int) -> bytes:
        return json.dumps({"step": step, "time": 0, "metrics": {}}).encode() + b"\n"

    def steps(*written: int) -> list[int]:
        store.write("distill/metrics.jsonl", b"".join(map(line, written)))
        files.received(log.parent)
        return [record.step for record in tail.poll()]

    assert steps(1, 2) == [1, 2]
    assert steps(1, 2, 3) == [3]
    assert steps(1, 2, 3) == []
    # A resumed job cut it back to its checkpoint.
    assert steps(1, 4) == [1, 4]


def test_a_start_model_of_this_machine_is_uploaded_once(uri: str, tmp_path: Path) -> None:
    start = tmp_path / "bert"
    start.mkdir()
    (start / "config.json").write_text("{}")
    files = open_mirror(uri)
    address = files.address(start)
    assert address.startswith(f"{uri}/inputs/bert-")
    assert Store(address).read("config.json") == b"{}"
    Store(address).write("config.json", b"as it was uploaded")
    assert files.address(start) == address
    assert Store(address).read("config.json") == b"as it was uploaded"
