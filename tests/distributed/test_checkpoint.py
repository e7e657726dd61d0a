"""Checkpoints in one process: damage, interruption, pruning and refusals."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from moe_dist.distributed import (
    TrainEngine,
    build_engine,
    checkpoint_files,
    list_checkpoints,
    load_checkpoint,
    manifest,
    save_checkpoint,
    verify_checkpoint,
)
from moe_dist.distributed.integrity import stored_digests
from moe_dist.errors import CheckpointError
from moe_dist.moe.digests import numbered
from tests.distributed.tiny_moe import Case, make_engine, train_steps

LOCAL = Case(1, 1, 0)


@pytest.fixture
def engine() -> TrainEngine:
    made = make_engine(LOCAL)
    train_steps(made, LOCAL, 0, 2)
    return made


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def test_directory_holds_what_is_documented(tmp_path: Path, engine: TrainEngine) -> None:
    """Names, per-parameter moments, a digest for each file and each expert, no pickle."""
    place = save_checkpoint(tmp_path, engine, step=2, state={"epoch": 1})
    assert place == tmp_path / "step-00000002"
    assert sorted(path.name for path in place.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "rng.safetensors",
        "state.json",
    ]
    model = load_file(place / "model.safetensors")
    moments = load_file(place / "optimizer.safetensors")
    trained = {n for n, p in engine.module.named_parameters() if p.requires_grad}
    assert moments.keys() == {f"{m}.{n}" for n in trained for m in ("exp_avg", "exp_avg_sq")}
    written = json.loads((place / "manifest.json").read_text())
    assert written["experts"].keys() == {
        f"{layer}.{expert}" for layer in ("gated", "hashed") for expert in range(4)
    }
    changed = {**model, "gated.experts.w_in": model["gated.experts.w_in"].clone()}
    changed["gated.experts.w_in"][2, 0, 0] += 1
    before, after = (numbered(stored_digests(state, ["gated"])) for state in (model, changed))
    assert before.items() <= written["experts"].items()
    assert {key for key in before if before[key] != after[key]} == {"gated.2"}


def test_a_figure_without_a_value_is_given_back(tmp_path: Path, engine: TrainEngine) -> None:
    """A resumed run reports it again, and None is no figure."""
    save_checkpoint(tmp_path, engine, step=2, state={"evaluation": {"pearson": float("nan")}})
    state = load_checkpoint(tmp_path, engine)
    assert state is not None and math.isnan(state["evaluation"]["pearson"])


def test_nothing_there_is_none(tmp_path: Path, engine: TrainEngine) -> None:
    """A first start finds no checkpoint and says so without an error."""
    assert load_checkpoint(tmp_path / "new", engine) is None
    assert list_checkpoints(tmp_path / "new") == []


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
def test_damaged_file_is_named_and_the_one_before_is_used(
    tmp_path: Path, engine: TrainEngine, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One flipped byte anywhere is found before anything is loaded."""
    save_checkpoint(tmp_path, engine, step=1, state={"epoch": 0})
    newest = save_checkpoint(tmp_path, engine, step=2, state={"epoch": 1})
    flip_byte(newest / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        verify_checkpoint(newest)
    with caplog.at_level(logging.WARNING):
        assert load_checkpoint(tmp_path, engine) == {"epoch": 0, "step": 1}
    assert f"{newest / name} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("text", "damaged"),
    [
        ('"bytes"', '"bytfs"'),
        ('"sha256"', '"sha25"'),
        ('"files": {', '"filfs": {'),
        ('"experts": {', '"experts_": {'),
        ('"gated.2"', '"gated.x"'),
        ('"format_version": 1', '"format_version": 7'),
    ],
)
def test_a_damaged_manifest_is_a_damaged_checkpoint(
    tmp_path: Path, engine: TrainEngine, text: str, damaged: str
) -> None:
    save_checkpoint(tmp_path, engine, step=1, state={})
    path = save_checkpoint(tmp_path, engine, step=2, state={}) / "manifest.json"
    content = path.read_text()
    assert text in content
    path.write_text(content.replace(text, damaged))
    with pytest.raises(CheckpointError, match=r"manifest\.json (is damaged|has format_version 7)"):
        verify_checkpoint(path.parent)
    assert load_checkpoint(tmp_path, engine) == {"step": 1}


def test_a_file_that_cannot_be_read_is_a_damaged_checkpoint(
    tmp_path: Path, engine: TrainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk with bad blocks."""
    save_checkpoint(tmp_path, engine, step=1, state={})
    newest = save_checkpoint(tmp_path, engine, step=2, state={})
    read = manifest.file_digest

    def bad_block(path: Path) -> str:
        if path.parent == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(manifest, "file_digest", bad_block)
    with pytest.raises(CheckpointError, match=r"step-00000002 cannot be read: .*Input/output"):
        verify_checkpoint(newest)
    assert load_checkpoint(tmp_path, engine) == {"step": 1}


def test_truncated_missing_and_all_damaged(tmp_path: Path, engine: TrainEngine) -> None:
    """A cut file says its sizes, a lost one that it is lost; with no good one left, an error."""
    place = save_checkpoint(tmp_path, engine, step=1, state={})
    os.truncate(place / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged: 100 bytes instead"):
        load_checkpoint(place, engine)
    (place / "rng.safetensors").unlink()
    (place / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*model\.safetensors is missing"):
        load_checkpoint(tmp_path, engine)
    (place / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        load_checkpoint(place, engine)


@pytest.mark.parametrize("name", ["extra.pt", "model.BIN"])
def test_pickles_are_refused(tmp_path: Path, engine: TrainEngine, name: str) -> None:
    """A file that could run code is not even tolerated beside the others."""
    place = save_checkpoint(tmp_path, engine, step=1, state={})
    (place / name).write_bytes(b"anything")
    with pytest.raises(CheckpointError, match="may be a pickle"):
        load_checkpoint(place, engine)


def test_interrupted_write_leaves_the_older_ones(
    tmp_path: Path, engine: TrainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer killed before the rename leaves nothing that is taken for a checkpoint."""
    save_checkpoint(tmp_path, engine, step=1, state={})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, engine, step=2, state={})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert load_checkpoint(tmp_path, engine) == {"step": 1}
    save_checkpoint(tmp_path, engine, step=2, state={})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_full_disk_is_a_clear_error(tmp_path: Path, engine: TrainEngine) -> None:
    """A write that the system refuses names the checkpoint and leaves nothing behind."""
    save_checkpoint(tmp_path, engine, step=1, state={})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(CheckpointError, match="step-00000002 could not be written"):
            save_checkpoint(tmp_path, engine, step=2, state={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    verify_checkpoint(tmp_path / "step-00000001")


def test_full_disk_is_named_in_the_words_of_safetensors(
    tmp_path: Path, engine: TrainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(checkpoint_files, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000001 could not be .* the disk is full"):
        save_checkpoint(tmp_path, engine, step=1, state={})


def test_old_and_abandoned_checkpoints_go(tmp_path: Path, engine: TrainEngine) -> None:
    """The newest two stay; after going back, later steps that were left go."""
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, engine, step=step, state={})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004", "step-00000003"]
    save_checkpoint(tmp_path, engine, step=3, state={"again": True})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003"]
    assert load_checkpoint(tmp_path, engine) == {"again": True, "step": 3}


def test_checkpoint_of_another_model_is_refused(tmp_path: Path, engine: TrainEngine) -> None:
    """Names and shapes must fit, and nothing is loaded before they do."""
    place = save_checkpoint(tmp_path, engine, step=1, state={})
    other = build_engine(nn.Linear(3, 2), learning_rate=0.1, weight_decay=0.0, num_steps=1)
    with pytest.raises(CheckpointError, match="is of another model"):
        load_checkpoint(place, other)
    same_names = make_engine(LOCAL)
    same_names.module.get_submodule("head").weight = nn.Parameter(torch.zeros(5, 8))
    with pytest.raises(CheckpointError, match=r"head.weight has shape \[3, 8\]"):
        load_checkpoint(place, same_names)


def test_random_numbers_continue(tmp_path: Path, engine: TrainEngine) -> None:
    """After the load the next random number is the one that came after the save."""
    save_checkpoint(tmp_path, engine, step=1, state={})
    expected = torch.rand(3)
    load_checkpoint(tmp_path, engine)
    assert torch.equal(torch.rand(3), expected)


def test_moved_checkpoint_loads(tmp_path: Path, engine: TrainEngine) -> None:
    """Nothing in a checkpoint depends on where it lies."""
    place = save_checkpoint(tmp_path / "a", engine, step=1, state={})
    shutil.copytree(place, tmp_path / "b" / place.name)
    assert load_checkpoint(tmp_path / "b", engine) == {"step": 1}
