"""Language models: the whole chain, from text files to a model that writes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional

from moe_dist.config import load_config
from moe_dist.errors import ConfigError, ConversionError, DataError
from moe_dist.inference import load_model, load_tokenizer
from moe_dist.inference.serving import TextModel
from moe_dist.jobs.results import load_predictions
from pipelines.chain.chain import run_chain
from pipelines.chain.workspace import Workspace
from pipelines.checks.preflight import check_before_start
from pipelines.report.nearness import load_imitation
from tests.inference.start_models import WORDS, write_start_model, write_tokenizer
from tests.pipelines.recorder import Recorder


def write_text(path: Path, *, count: int, offset: int = 0) -> str:
    """Write documents under headings, each of some lines."""
    lines = []
    for number in range(offset, offset + count):
        lines += ["", f" = {WORDS[number % len(WORDS)]} = ", ""]
        for line in range(1, 4):
            lines.append(" ".join(WORDS[(number * line + n * n) % len(WORDS)] for n in range(9)))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def write_llama(directory: Path) -> Path:
    """Write a random Llama with two layers, which has no pad token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(directory, "gpt2", without=("pad_token",))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return language_recipe(tmp_path)


def language_recipe(directory: Path) -> dict[str, Any]:
    """Give the settings of a small recipe, whose text and model it writes."""
    return {
        "name": "words",
        "output_dir": str(directory / "outputs"),
        "model": {"teacher": str(write_llama(directory / "llama")), "max_length": 16},
        "data": {
            "source": "files",
            "kind": "causal_lm",
            "train": write_text(directory / "train.txt", count=20),
            "dev": write_text(directory / "dev.txt", count=6, offset=1000),
        },
        "finetune": {"num_epochs": 0},
        "moe": {
            "num_experts": 2,
            "expert_size": 16,
            "num_shared_neurons": 4,
            "partition": "token_clusters",
            "router": "token_gate",
        },
        "compare": {"dense": {"moe.num_experts": 1, "moe.partition": "importance"}},
        "train": {"max_steps": 3, "batch_size": 8, "log_every": 1, "learning_rate": 1e-3},
        "distill": {"load_balancing_weight": 0.01, "soft_weight": 0.5},
        "parallel": {"launcher": "local"},
        "tracking": {"enabled": False},
    }


def run(path: Path, settings: dict[str, Any]) -> Recorder:
    recipe = path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    console = Recorder()
    run_chain(load_config(recipe), console)
    return console


def test_the_chain_runs_to_its_end_and_measures_documents(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    console = run(tmp_path, settings)
    assert console.ran[-1] == "evaluate"
    root = tmp_path / "outputs/words"
    report = json.loads((root / "report.json").read_text())
    assert report["main_metric"] == "perplexity"
    figures = report["data"]["summaries"][""]["figures"]
    assert "blocks to train on of at most 16 tokens" in figures and "windows for dev" in figures
    said = " ".join([*console.noted, *console.warned])
    assert "'<end>' stands between documents" in said
    assert "no pad token: '<end>' stands in" in said
    assert "a document begins at each heading" in said
    saved = load_predictions(root / "evaluate/predictions/teacher.npz")
    assert saved.logits.shape == (6, 4)
    teacher = load_model(root / "finetune-teacher/model")
    tokenizer = load_tokenizer(root / "finetune-teacher/model")
    # With few tokens before each: as a loop over tokens finds it.
    text = (tmp_path / "dev.txt").read_text().split("\n = ")[1]
    ids = tokenizer(" = " + text.rstrip("\n"), return_tensors="pt")["input_ids"][0]
    nll, end = 0.0, 1
    for begin in range(0, len(ids), 8):
        window = ids[begin : begin + 17]
        with torch.no_grad():
            logits = teacher(window[None, :-1]).logits[0]
        for place, target in enumerate(window[1:].tolist(), start=1):
            if begin + place >= end:
                nll += float(functional.cross_entropy(logits[place - 1], torch.tensor(target)))
                end = begin + place + 1
        if end == len(ids):
            break
    assert saved.logits[0, 1] == len(ids) - 1
    assert saved.logits[0, 0] == pytest.approx(nll, rel=1e-4)
    total, count = saved.logits[:, :2].astype(float).sum(0)
    assert report["teacher"]["metrics"]["perplexity"] == pytest.approx(math.exp(total / count))
    near = load_imitation(root / "evaluate/predictions/imitation.npz")
    assert len(near["prediction_error"]["student"]) == 6
    assert report["student"]["imitation"]["prediction_error"] > 0
    assert "6 dev documents" in (root / "report.md").read_text()
    served = TextModel(load_model(root / "distill/model"), tokenizer, max_length=16)
    assert isinstance(served.predict(["good film"])["text"][0], str)


def test_another_stride_measures_anew_and_trains_nothing(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    own = settings | {"compare": {}}
    run(tmp_path, own)
    assert run(tmp_path, own | {"data": settings["data"] | {"stride": 16}}).ran == ["evaluate"]


def test_a_teacher_from_nothing_is_fine_tuned(tmp_path: Path, settings: dict[str, Any]) -> None:
    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_DIST_CACHE", str(cache))
        console = run(
            tmp_path,
            settings
            | {
                "model": {"teacher": "scratch:tiny-gpt2", "max_length": 16},
                "finetune": {"max_steps": 2},
                "compare": {},
                "moe": settings["moe"] | {"partition": "importance", "router": "hash_balanced"},
                "distill": {},
            },
        )
    assert any("random weights" in line for line in console.noted)
    report = json.loads((tmp_path / "outputs/words/report.json").read_text())
    assert np.isfinite(report["student"]["metrics"]["bits_per_byte"])


def refusal(tmp_path: Path, settings: dict[str, Any], *errors: type[Exception]) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    config = load_config(recipe)
    with pytest.raises(errors) as caught:
        check_before_start(config, Workspace(config, Recorder()))
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, settings: dict[str, Any], tiny_bert: Path
) -> None:
    def with_model(**changes: Any) -> dict[str, Any]:
        return settings | {"model": settings["model"] | changes}

    encoder = with_model(teacher=str(tiny_bert))
    assert "is an encoder" in refusal(tmp_path, encoder, ConversionError)
    write_start_model(tmp_path / "bart", "bart")
    both = with_model(teacher=str(tmp_path / "bart"))
    assert "is an encoder-decoder" in refusal(tmp_path, both, ConversionError)
    long = with_model(max_length=97)
    assert "more than the 96 positions" in refusal(tmp_path, long, ConfigError)
    (tmp_path / "short.txt").write_text("good film\n")
    short = settings | {"data": settings["data"] | {"train": str(tmp_path / "short.txt")}}
    assert "fewer than one block" in refusal(tmp_path, short, DataError)
    write_tokenizer(tmp_path / "llama", "gpt2", without=("eos_token",))
    assert "no end token" in refusal(tmp_path, settings, ConversionError)
