"""`moe-dist profile`: what it shows of a model and of a recipe's step, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType
from typer.testing import CliRunner

from moe_dist.inference import save_model
from moe_dist.training.parts import PREFIX, STEP
from pipelines.benchmarks.profile_model import operator_shares
from pipelines.benchmarks.profile_step import NUM_WARMUPS, step_parts
from pipelines.cli import app
from tests.inference.moe_students import student

Write = Callable[[dict[str, Any]], Path]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "student"
    save_model(student(router="token_gate"), place)
    return place


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["profile", *map(str, arguments)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def names(trace: Path) -> set[str]:
    return {str(event.get("name")) for event in json.loads(trace.read_text())["traceEvents"]}


def test_a_model_by_part_and_operator(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = run(directory, "--shape", "2x8", "--passes", "3", "--output", out)
    assert code == 0, output
    report = json.loads((out / "profile.json").read_text())
    assert (report["form"], report["shape"]) == ("eager-fp32", [2, 8])
    parts = {one["name"]: one for one in report["parts"]}
    assert {"embeddings", "attention", "router", "dispatch", "experts", "head", "rest"} <= set(
        parts
    )
    assert parts["experts"]["calls"] == 2
    assert sum(one["share"] for one in report["parts"]) == pytest.approx(1)
    assert sum(one["ms"] for one in report["parts"]) == pytest.approx(report["watched_ms"])
    assert report["pass_ms"] > 0
    operators = {one["name"] for one in report["operators"]}
    assert any(name.startswith("aten::") for name in operators)
    assert "| attention |" in (out / "profile.md").read_text()
    assert {"moe-dist: attention", "moe-dist: experts"} <= names(out / "trace.json")


def test_a_form_and_no_files(directory: Path, tmp_path: Path) -> None:
    code, output = run(directory, "--form", "lean-fp32", "--shape", "1x8", "--passes", "1")
    assert code == 0, output
    # Where a processor has no native products, the blocks keep their own parts.
    assert "attention, router and experts" in output or "dispatch and experts" in output
    assert "--output DIR writes this" in output


def test_a_step_by_part(write_recipe: Write, tiny_settings: dict[str, Any], tmp_path: Path) -> None:
    tiny_settings["parallel"] = {"num_workers": 2}
    recipe, out = write_recipe(tiny_settings), tmp_path / "out"
    # The teacher is there by then, so that no workers are started for it.
    alone = ["finetune-teacher", str(recipe), "--set", "parallel.num_workers=1"]
    assert CliRunner().invoke(app, alone).exit_code == 0
    teacher = tmp_path / "outputs/tiny/finetune-teacher/model/model.safetensors"
    written = teacher.stat().st_mtime_ns
    code, output = run(recipe, "--steps", "3", "--output", out, "--set", "moe.router=token_gate")
    assert code == 0, output
    assert teacher.stat().st_mtime_ns == written
    report = json.loads((out / "profile.json").read_text())
    assert (report["num_steps"], report["batch_size"]) == (3, 8)
    parts = {one["name"]: one for one in report["parts"]}
    wanted = (
        "teacher forward,student forward,losses,backward,embedding gradients,update,logging,rest"
    )
    assert set(wanted.split(",")) <= set(parts)
    for name in ("teacher forward", "student forward", "backward", "update"):
        assert parts[name]["calls"] == 1, name
    assert all(one["ms"] >= 0 for one in report["parts"])
    assert sum(one["share"] for one in report["parts"]) == pytest.approx(1)
    assert "one process takes the whole step here" in output
    assert "moe-dist: teacher forward" in names(out / "trace.json")
    # Nothing is kept of what was trained.
    assert not (tmp_path / "outputs/tiny/distill").exists()

    for settings, said in (
        (("--steps", 30), "the recipe trains 6 steps, and 2 that warm up and 30 to look at"),
        (
            ("--set", "finetune.num_epochs=1", "--set", "train.num_epochs=0"),
            "this recipe does not train its student; set train.num_epochs above 0",
        ),
        (("--steps", 0), "--steps is 0"),
    ):
        code, output = run(recipe, "--set", "moe.router=token_gate", *settings)
        assert code == 2
        assert said in output
        assert "Traceback" not in output


def test_bad_input_is_one_clear_error(directory: Path, tmp_path: Path) -> None:
    file = directory / "config.json"
    recipe = tmp_path / "recipe.yaml"
    recipe.touch()
    for arguments, said in (
        ((directory, "--shape", "16"), "such as 1x16"),
        ((directory, "--shape", "1x25"), "reads at most 24"),
        ((directory, "--shape", "0x5"), "has nothing in it"),
        ((directory, "--form", "fast-fp32"), "'fast' is not one of"),
        ((directory, "--passes", "0"), "num_passes is 0"),
        ((directory, "--threads", "0"), "num_threads is 0"),
        ((directory, "--steps", "3"), "--steps is an option for a recipe"),
        ((directory, "--set", "seed=1"), "--set is an option for a recipe"),
        ((directory, "--output", file), "is a file"),
        ((recipe, "--form", "lean-fp32"), "--form is an option for a model"),
        ((tmp_path / "none", "--shape", "1x16"), "none does not exist; give a model's directory"),
        ((tmp_path / "none.yaml",), "none.yaml does not exist"),
        ((tmp_path,), str(tmp_path)),
    ):
        code, output = run(*arguments)
        assert code != 0, output
        assert said in output
        assert "Traceback" not in output


def test_times_on_a_gpus_own_timeline_are_no_steps() -> None:
    def event(name: str, begin: float, end: float, device: DeviceType) -> Any:
        return SimpleNamespace(
            name=name,
            time_range=SimpleNamespace(start=begin * 1e3, end=end * 1e3),
            device_type=device,
        )

    events = []
    for step in range(NUM_WARMUPS + 2):
        begin = 100.0 * step
        for device, shift in ((DeviceType.CPU, 0.0), (DeviceType.CUDA, 30.0)):
            events += [
                event(f"{PREFIX}{STEP}", begin + shift, begin + shift + 20, device),
                event(f"{PREFIX}backward", begin + shift + 5, begin + shift + 15, device),
            ]
    times, calls, steps = step_parts(events)
    assert times == {"backward": 10, "rest": 10}
    assert calls == {"backward": 1, "rest": 1}
    assert steps == [20, 20]


def test_operators_of_a_gpu_are_ranked_by_its_own_time() -> None:
    rows = [
        SimpleNamespace(
            key=key, count=2, self_cpu_time_total=cpu, self_device_time_total=gpu, device_type=kind
        )
        for key, cpu, gpu, kind in (
            ("aten::mm", 1e3, 8e3, DeviceType.CPU),
            ("aten::item", 5e3, 0.0, DeviceType.CPU),
            # The same time once more, by the kernel's name.
            ("sgemm_kernel", 0.0, 8e3, DeviceType.CUDA),
        )
    ]
    profiler = SimpleNamespace(key_averages=lambda: rows)
    (first, *others) = operator_shares(profiler, 2, on_gpu=True)
    assert (first.name, first.ms, first.share, first.calls) == ("aten::mm", 4, 1, 1)
    assert [one.name for one in others] == ["aten::item"]
    assert operator_shares(profiler, 2)[0].name == "aten::item"
