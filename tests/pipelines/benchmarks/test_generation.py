"""`moe-dist benchmark generation`: what it times, says and refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.inference import save_model
from moe_dist.inference.backends import QUICK_FORMS, Form
from pipelines.benchmarks.generation import GenerationBenchmark
from pipelines.benchmarks.generation import run as run_benchmark
from pipelines.cli import app
from tests.conversion.dense_models import tiny_model
from tests.inference.moe_students import student


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    save_model(tiny_model("llama"), place / "finetune-teacher" / "model")
    save_model(student("llama", router="hash_random"), place / "distill" / "model")
    save_model(tiny_model("gpt2"), place / "gpt2" / "model")
    return place


def run(*arguments: str) -> tuple[int, str]:
    command = ["benchmark", "generation", *arguments]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "250"})
    return result.exit_code, result.output


SHORT = ("--tokens", "4", "--prompt", "3", "--prefill", "6", "--rounds", "2")


def test_every_form_of_every_model_is_timed_and_compared(models: Path, tmp_path: Path) -> None:
    code, output = run(
        *(str(models / "finetune-teacher/model"), f"sparse={models / 'distill/model'}"),
        *(*SHORT, "--batch", "1", "--batch", "3", "--output", str(tmp_path)),
    )
    assert code == 0, output
    assert "decode 3, each in its fastest form: finetune-teacher" in output
    assert "prefill 6, each in its fastest form: finetune-teacher" in output
    report = json.loads((tmp_path / "generation.json").read_text())
    refused = " ".join(report["refused"])
    forms = [str(form) for form in QUICK_FORMS if str(form) not in refused]
    by_key = {(one["model"], one["form"], one["part"]): one for one in report["timings"]}
    assert set(by_key) == {
        (model, form, part)
        for model in ("finetune-teacher", "sparse")
        for form in forms
        for part in ("decode 1", "decode 3", "prefill 6")
    }
    for (_, form, part), one in by_key.items():
        first = by_key["finetune-teacher", form, part]["low_ms"]
        assert one["speed"] == pytest.approx(first / one["low_ms"])
        number = {"decode 1": 1, "decode 3": 3, "prefill 6": 6}[part]
        assert one["tokens_per_s"] == pytest.approx(number / one["low_ms"] * 1e3)
        assert one["error"] <= {"fp32": 1e-5, "bf16": 0.1, "int8": 0.2}[form[-4:]]
        assert one["same_words"] >= (1 if form.endswith("fp32") else 0.5)
    assert "| lean-bf16 |" in (tmp_path / "generation.md").read_text()


def test_a_step_is_timed_without_the_prompt(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the steps after the first token, by a clock of our own."""
    now = iter(range(10**6))
    clock = SimpleNamespace(perf_counter=lambda: next(now))
    monkeypatch.setattr("pipelines.benchmarks.generation.time", clock)
    report = run_benchmark(
        GenerationBenchmark(
            {"teacher": models / "finetune-teacher/model"},
            batch_sizes=(2,),
            prompt_len=6,
            prefill_len=6,
            num_new_tokens=5,
            forms=(Form(),),
            num_rounds=1,
        )
    )
    steps = next(one for one in report.timings if one.part == "decode 2")
    assert steps.low_ms == 1000.0  # one call of the clock for each token
    assert steps.tokens_per_s == 2.0


def test_a_form_that_writes_otherwise_is_seen(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(form: Form, model: Any) -> Any:
        other = copy.deepcopy(model)
        if form != Form():
            with torch.no_grad():
                other.lm_head.weight.neg_()
        return other

    monkeypatch.setattr(Form, "prepare", prepare)
    settings = GenerationBenchmark(
        {"teacher": models / "finetune-teacher/model"},
        prompt_len=6,
        prefill_len=6,
        num_new_tokens=4,
        forms=(Form("lean"),),
        num_rounds=1,
    )
    for one in run_benchmark(settings).timings:
        assert (one.same_words, one.error) == ((1, 0) if one.form == "eager-fp32" else (0, 2))


def test_a_decoder_of_another_kind(models: Path) -> None:
    code, output = run(str(models / "gpt2/model"), *SHORT, "--batch", "2")
    assert code == 0, output
    assert "not there: gpt2, lean-int8" in output


def test_what_does_not_write_is_left_out_with_the_reason(models: Path, tmp_path: Path) -> None:
    """In a form, or at all; the others are timed."""
    static = tiny_model("llama")
    static.generation_config.cache_implementation = "static"
    save_model(static, tmp_path / "static" / "model")
    save_model(student("llama", router="sentence_gate"), tmp_path / "sentence" / "model")
    sentence = str(tmp_path / "sentence/model")
    code, output = run(
        *(sentence, str(tmp_path / "static/model"), str(models / "finetune-teacher/model")),
        *(*SHORT, "--batch", "1", "--form", "lean-fp32"),
    )
    assert code == 0, output
    assert "not there: static, lean-fp32: a decoder in its lean form takes no StaticCache" in output
    assert "not there: sentence, eager-fp32: " in output
    assert "not there: sentence, lean-fp32: " in output
    assert "decode 1, each in its fastest form: static" in output
    assert "finetune-teacher" in output
    code, output = run(sentence, *SHORT)
    assert code != 0
    assert "sentence, eager-fp32: " in output
    assert "Traceback" not in output


def test_bad_input_is_one_clear_error(models: Path, tmp_path: Path) -> None:
    place = str(models / "distill/model")
    save_model(tiny_model("bert"), tmp_path / "bert" / "model")
    save_model(tiny_model("t5"), tmp_path / "t5" / "model")
    for arguments, said in (
        ((place, "--form", "fast-fp32"), "'fast' is not one of eager, lean"),
        ((place, "--batch", "0"), "--batch 0 is less than 1"),
        ((place, "--tokens", "1"), "--tokens 1 has no step"),
        ((place, "--prompt", "0"), "--prompt is 0"),
        ((place, "--prefill", "0"), "--prefill is 0"),
        ((place, "--rounds", "0"), "--rounds is 0"),
        ((place, place), "two models are called distill"),
        ((str(tmp_path / "bert/model"),), "bert is no decoder that writes texts"),
        ((str(tmp_path / "t5/model"),), "t5 is no decoder that writes texts"),
        ((str(models / "gpt2/model"),), "gpt2 reads at most 24"),
        ((place, "--layers", "2"), "--layers says what --random draws"),
        (("--random", "--router", "sentence_gate"), "a cache hides them"),
        ((), "give directories of models, or --random"),
        ((place, "--output", str(models / "distill/model/config.json")), "is a file"),
    ):
        code, output = run(*arguments)
        assert code != 0
        assert said in output
        assert "Traceback" not in output


def test_models_of_random_weights() -> None:
    sizes = ("--d-model", "192", "--neurons", "128", "--experts", "2", "--expert-size", "32")
    code, output = run(
        *("--random", *sizes, "--layers", "1", "--router", "token_gate", *SHORT),
        *("--form", "lean-fp32", "--batch", "1"),
    )
    assert code == 0, output
    for name in ("teacher", "student", "dense"):
        assert output.count(f" {name} ") >= 2
