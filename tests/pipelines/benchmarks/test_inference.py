"""`moe-dist benchmark inference`: what it times, says and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.inference import save_model
from moe_dist.inference.backends import QUICK_FORMS, Form
from pipelines.benchmarks.forms import fastest, verdicts
from pipelines.benchmarks.inference import InferenceBenchmark, Timing
from pipelines.benchmarks.inference import run as run_benchmark
from pipelines.cli import app
from tests.conversion.dense_models import tiny_model
from tests.inference.moe_students import student


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    save_model(tiny_model("bert"), place / "finetune-teacher" / "model")
    save_model(student(router="token_gate"), place / "distill" / "model")
    return place


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["benchmark", "inference", *arguments], env={"COLUMNS": "250"})
    return result.exit_code, result.output


def test_every_form_of_every_model_is_timed_and_compared(models: Path, tmp_path: Path) -> None:
    code, output = run(
        *(str(models / "finetune-teacher/model"), f"sparse={models / 'distill/model'}"),
        *("--shape", "1x5", "--shape", "3x4", "--rounds", "2", "--output", str(tmp_path)),
    )
    assert code == 0, output
    assert "each in its fastest form: finetune-teacher" in output
    report = json.loads((tmp_path / "inference.json").read_text())
    timings = report["timings"]
    keys = {(one["model"], one["form"], tuple(one["shape"])) for one in timings}
    refused = " ".join(report["refused"])
    forms = [str(form) for form in QUICK_FORMS if str(form) not in refused]
    assert {"eager-fp32", "eager-bf16", "lean-fp32", "lean-bf16"} <= set(forms)
    assert keys == {
        (model, form, shape)
        for model in ("finetune-teacher", "sparse")
        for form in forms
        for shape in ((1, 5), (3, 4))
    }
    by_key = {(one["model"], one["form"], tuple(one["shape"])): one for one in timings}
    for (_, form, shape), one in by_key.items():
        first = by_key["finetune-teacher", form, shape]["low_ms"]
        oracle = by_key["finetune-teacher", "eager-fp32", shape]["low_ms"]
        assert one["speed"] == pytest.approx(first / one["low_ms"])
        assert one["speed_over_oracle"] == pytest.approx(oracle / one["low_ms"])
        assert one["error"] <= {"fp32": 1e-5, "bf16": 0.1, "int8": 0.2}[form[-4:]]
        assert (one["error"] == 0) == (form == "eager-fp32") or form == "lean-fp32"
    assert "| lean-bf16 |" in (tmp_path / "inference.md").read_text()


def test_forms_are_made_with_the_threads_that_they_are_timed_with(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of ONNX Runtime keeps those that torch has when it is made."""
    threads = []

    def prepare(form: Form, model: Any) -> Any:
        threads.append(torch.get_num_threads())
        return model

    monkeypatch.setattr(Form, "prepare", prepare)
    wanted = torch.get_num_threads() + 1
    settings = InferenceBenchmark(
        {"student": models / "distill/model"}, shapes=((1, 4),), num_rounds=1, num_threads=wanted
    )
    assert settings.forms == QUICK_FORMS
    run_benchmark(settings)
    assert threads == [wanted] * len(QUICK_FORMS)


def test_only_the_forms_that_are_asked_for(models: Path) -> None:
    code, output = run(
        str(models / "distill/model"), "--shape", "1x4", "--form", "lean-fp32", "--rounds", "1"
    )
    assert code == 0, output
    assert "lean-fp32" in output
    assert "eager-fp32" in output
    assert "bf16" not in output


def test_sentences_of_all_lengths(models: Path, tmp_path: Path) -> None:
    code, output = run(
        *(str(models / "distill/model"), "--shape", "3x8", "--form", "lean-fp32", "--rounds", "1"),
        *("--padded", "--output", str(tmp_path)),
    )
    assert code == 0, output
    assert "3 × up to 8" in output
    timings = json.loads((tmp_path / "inference.json").read_text())["timings"]
    assert all(one["padded"] and one["error"] < 1e-5 for one in timings)


def test_a_path_with_an_equals_sign_and_a_model_of_several_tasks(tmp_path: Path) -> None:
    model = tiny_model("bert", num_labels=5)
    set_heads(model, [TaskHead("a", ("no", "yes")), TaskHead("b", ("x", "y", "z"))])
    place = save_model(model, tmp_path / "lr=1e-4" / "model")
    code, output = run(str(place), "--shape", "1x4", "--form", "lean-fp32", "--rounds", "1")
    assert code == 0, output
    assert "lr=1e-4" in output


def test_bad_input_is_one_clear_error(models: Path) -> None:
    place = str(models / "distill/model")
    for arguments, said in (
        ((place, "--form", "fast-fp32"), "'fast' is not one of eager, lean"),
        ((place, "--shape", "16"), "such as 1x16"),
        ((place, "--shape", "0x16"), "has nothing in it"),
        ((place, place), "two models are called distill"),
        ((str(models / "nothing"),), "is no directory"),
        ((place, "--rounds", "0"), "--rounds is 0"),
        ((place, "--threads", "0"), "--threads is 0"),
        ((place, "--shape", "1x25"), "reads at most 24"),
        (("=" + place,), "is no directory"),
        (("student=",), "is no directory"),
        ((place, "--output", str(models / "distill/model/config.json")), "is a file"),
    ):
        code, output = run(*arguments)
        assert code != 0
        assert said in output
        assert "Traceback" not in output


def test_models_of_random_weights() -> None:
    sizes = ("--d-model", "64", "--neurons", "128", "--experts", "2", "--expert-size", "32")
    code, output = run(
        *("--random", *sizes, "--layers", "1", "--router", "hash_random", "--rounds", "1"),
        *("--shape", "2x9", "--form", "lean-fp32"),
    )
    assert code == 0, output
    for name in ("teacher", "student", "dense"):
        assert output.count(f" {name} ") >= 2


def test_random_models_that_cannot_be() -> None:
    code, output = run("--random", "--experts", "8", "--top-k", "9", "--router", "expert_choice")
    assert code == 2
    assert "--experts 8 of --expert-size 768 are more than --neurons 3072" in output
    assert "--top-k 9 is more than --experts 8" in output
    assert "--router expert_choice is not one of token_gate" in output
    assert "--layers is 0; it must be at least 1" in run("--random", "--layers", "0")[1]
    assert "--d-model 40 is no multiple of 32" in run("--random", "--d-model", "40")[1]
    code, output = run("--experts", "8", "somewhere")
    assert code == 2
    assert "--experts says what --random draws" in output
    assert "give directories of models, or --random" in run()[1]
    assert "give directories of models, or --random" in run("--random", ".")[1]


@pytest.mark.parametrize("distance", [0.2, float("nan")])
def test_a_form_that_answers_otherwise_is_not_the_fastest(distance: float) -> None:
    def timing(form: str, low_ms: float, distance: float) -> Timing:
        return Timing("one", form, low_ms, low_ms, 0.0, 1.0, 1.0, distance, distance, (1, 4))

    timings = [timing("eager-fp32", 2.0, 0.0), timing("lean-int8", 1.0, distance)]
    assert fastest(timings, "one", "1 × 4").form == "eager-fp32"
    assert "not counted as the fastest: one in lean-int8" in verdicts(timings, (), "")[-1]
    # A model that itself gives no answers has no form that gives other ones.
    assert fastest(timings[1:], "one", "1 × 4").form == "lean-int8"
