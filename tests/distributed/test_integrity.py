"""Lost, doubled, swapped and changed experts are found, and named with their ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_dist.digests import file_digest
from moe_dist.distributed import (
    TrainEngine,
    checkpoint,
    checkpoint_writer,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from moe_dist.distributed.gathering import gather_model
from moe_dist.distributed.integrity import Digests, check_gathered, check_spread, layer_faults
from moe_dist.distributed.restore import read_into
from moe_dist.errors import CheckpointError
from tests.distributed.tiny_moe import Case, make_engine, train_steps

LOCAL = Case(1, 1, 0)
EXPECTED: Digests = {"layer.3": [f"digest {e}" for e in range(8)], "dense": ["one"]}


def ranks(*layers: list[int]) -> list[Digests]:
    return [
        {"layer.3": [f"digest {expert}" for expert in held], "dense": ["one"]} for held in layers
    ]


@pytest.mark.parametrize(
    ("held", "ep_size"),
    [
        (ranks([0, 1, 2, 3, 4, 5, 6, 7]), 1),
        (ranks([0, 1, 2, 3], [4, 5, 6, 7]), 2),
        (ranks([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 7]), 2),
        (ranks(*[[0, 1, 2, 3, 4, 5, 6, 7]] * 3), 1),
    ],
)
def test_each_group_holds_each_expert_once(held: list[Digests], ep_size: int) -> None:
    check_spread(held, EXPECTED, ep_size=ep_size)


@pytest.mark.parametrize(
    ("held", "told"),
    [
        (
            ranks([0, 1], [2, 4], [4, 3], [6, 7]),
            "layer.3: expert 4 is held twice (ranks 1 and 2); expert 5 is missing",
        ),
        (ranks([0, 1], [2, 3], [4, 99], [6, 7]), "expert 5 is missing; 1 held of unknown weights"),
        (
            ranks([0, 1], [2, 3], [4, 6], [5, 7]),
            "expert 6 is in the place of expert 5 (rank 2); "
            "expert 5 is in the place of expert 6 (rank 3)",
        ),
        (ranks([0, 1], [2, 3], [4, 4], [4, 7]), "expert 4 is held 3 times (ranks 2 and 3)"),
    ],
)
def test_faults_are_named(held: list[Digests], told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_spread(held, EXPECTED, ep_size=4)
    for part in told.split("; "):
        assert part in str(caught.value)
    assert caught.value.remedy


def test_the_second_group_is_checked_too() -> None:
    held = ranks([0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3], [4, 5, 6, 6])
    with pytest.raises(CheckpointError, match=r"expert 6 is held twice \(rank 3\); expert 7 is mi"):
        check_spread(held, EXPECTED, ep_size=2)


def test_a_rank_that_differs_in_what_is_not_spread() -> None:
    held = ranks([0, 1, 2, 3], [4, 5, 6, 7])
    held[1]["dense"] = ["another"]
    with pytest.raises(CheckpointError, match=r"dense: expert 0 is missing.*\(rank 1\)"):
        check_spread(held, EXPECTED, ep_size=2)


def test_a_layer_that_the_manifest_leaves_out() -> None:
    with pytest.raises(CheckpointError, match=r"layer\.3: the manifest has no digest"):
        check_spread(ranks([0]), {"dense": ["one"]}, ep_size=1)


def test_experts_that_are_alike_are_no_fault() -> None:
    """Full copies start alike; what is wanted four times may be there four times."""
    alike = ["same"] * 4
    check_spread([{"a": alike[:2]}, {"a": alike[2:]}], {"a": alike}, ep_size=2)
    with pytest.raises(CheckpointError, match="expert 0 is missing"):
        check_spread([{"a": alike[:2]}, {"a": ["same", "other"]}], {"a": alike}, ep_size=2)


def test_gathered_experts_are_those_of_their_owners() -> None:
    owners = ranks([0, 1, 2, 3], [4, 5, 6, 7])
    check_gathered(EXPECTED, owners)
    swapped = EXPECTED["layer.3"][4:] + EXPECTED["layer.3"][:4]
    with pytest.raises(CheckpointError, match=r"expert 4 is in the place of expert 0 \(rank 0\)"):
        check_gathered({"layer.3": swapped, "dense": ["one"]}, owners)
    assert layer_faults("x", ["a"], []) == ["x: expert 0 is missing"]


@pytest.fixture
def engine() -> TrainEngine:
    made = make_engine(LOCAL)
    train_steps(made, LOCAL, 0, 1)
    return made


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([0, 2, 1, 3], "gated: expert 2 is in the place of expert 1"),
        ([0, 1, 1, 3], "gated: expert 1 is held twice; expert 2 is missing"),
        ([0, 1, 2], "gated: expert 3 is missing"),
    ],
)
def test_a_file_with_wrong_experts_is_passed_over(
    tmp_path: Path,
    engine: TrainEngine,
    rows: list[int],
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Even where the file's own digest is right: some tool rewrote it with experts mixed up."""
    save_checkpoint(tmp_path, engine, step=1, state={})
    place = save_checkpoint(tmp_path, engine, step=2, state={})
    path = place / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith("gated.experts.")]:
        tensors[name] = tensors[name][rows].contiguous()
    save_file(tensors, path)
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"][path.name] = {"sha256": file_digest(path), "bytes": path.stat().st_size}
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=told):
        verify_checkpoint(place)
    assert load_checkpoint(tmp_path, engine) == {"step": 1}
    assert told in caplog.text


def test_experts_that_change_while_they_are_gathered_are_not_saved(
    tmp_path: Path, engine: TrainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapping(*arguments: Any) -> dict[str, torch.Tensor]:
        model = gather_model(*arguments)
        for name in [name for name in model if name.startswith("hashed.experts.")]:
            model[name] = model[name][[1, 0, 2, 3]]
        return model

    monkeypatch.setattr(checkpoint_writer, "gather_model", swapping)
    with pytest.raises(CheckpointError, match=r"on their way to rank 0: hashed: expert 1 is in"):
        save_checkpoint(tmp_path, engine, step=1, state={})
    assert not list(tmp_path.iterdir())


def test_experts_that_change_after_they_are_read_are_found(
    tmp_path: Path, engine: TrainEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, engine, step=1, state={})

    def doubling(step_dir: Path, engine: TrainEngine) -> object:
        saved = read_into(step_dir, engine)
        with torch.no_grad():
            for parameter in engine.module.get_submodule("gated.experts").parameters():
                parameter[3] = parameter[0]
        return saved

    monkeypatch.setattr(checkpoint, "read_into", doubling)
    with pytest.raises(CheckpointError, match=r"gated: expert 0 is held twice \(rank 0\); expert"):
        load_checkpoint(tmp_path, engine)
