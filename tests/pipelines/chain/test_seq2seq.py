"""Encoder-decoders that write: the whole chain, from a recipe to a served model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moe_dist.config import load_config
from moe_dist.errors import ConfigError, ConversionError
from moe_dist.inference import load_model, load_tokenizer
from moe_dist.inference.serving import TextModel
from moe_dist.jobs.results import load_predictions
from moe_dist.moe.layer import moe_layers
from pipelines.chain.chain import run_chain
from pipelines.chain.workspace import Workspace
from pipelines.checks.preflight import check_before_start
from pipelines.stages.export import default_output, export_task
from tests.pipelines.recorder import Recorder
from tests.tasks.tiny_seq2seq import write_titles, write_writer

MOE = {
    "num_experts": 2,
    "expert_size": 16,
    "num_shared_neurons": 4,
    "partition": "token_clusters",
    "router": "token_gate",
}


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return writing_recipe(tmp_path)


def writing_recipe(directory: Path) -> dict[str, Any]:
    """Give the settings of a small recipe, whose rows and model it writes."""
    return {
        "name": "titles",
        "output_dir": str(directory / "outputs"),
        "model": {"teacher": str(write_writer(directory / "t5", "t5")), "max_length": 16},
        "data": {
            "source": "files",
            "kind": "seq2seq",
            "train": write_titles(directory / "train.jsonl", 32),
            "dev": write_titles(directory / "dev.jsonl", 7, offset=1000),
            "text_columns": "text",
            "label_column": "title",
            "source_prefix": "summarize : ",
            "max_target_length": 5,
            "num_beams": 2,
        },
        "moe": MOE,
        "train": {"num_epochs": 1, "batch_size": 8, "log_every": 2, "learning_rate": 1e-3},
        "distill": {"load_balancing_weight": 0.01},
        "parallel": {"launcher": "local"},
        "tracking": {"enabled": False},
    }


def run(path: Path, settings: dict[str, Any]) -> Recorder:
    recipe = path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    console = Recorder()
    run_chain(load_config(recipe), console)
    return console


def test_the_chain_runs_to_its_end_and_serves_texts(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    console = run(tmp_path, settings)
    assert console.ran == ["finetune-teacher", "score-importance", "adapt", "distill", "evaluate"]
    root = tmp_path / "outputs/titles"
    report = json.loads((root / "report.json").read_text())
    assert report["main_metric"] == "rougeL"
    assert set(report["student"]["metrics"]) == {"rouge1", "rouge2", "rougeL"}
    assert report["student"]["imitation"]["hidden_error"] > 0
    assert "0 targets cut" not in report["data"]["summaries"][""]["figures"]
    student = load_model(root / "distill/model")
    names = [layer.name for layer in moe_layers(student)]
    assert len(names) == 4 and sum("decoder" in name for name in names) == 2
    saved = load_predictions(root / "evaluate/predictions/student.npz")
    assert saved.texts is not None and len(saved.texts) == 7
    num_cut = int(saved.logits[:, -1].sum())
    said = [line for line in console.warned if line.startswith("student: ")]
    assert bool(num_cut) == any("had no end" in line for line in said)
    assert [f"student: {line}" for line in report["student"].get("remarks", ())] == said
    options = {key: settings["data"][key] for key in ("source_prefix", "max_target_length")}
    options["source_prefix"] = [options["source_prefix"]]
    served = TextModel(
        student,
        load_tokenizer(root / "distill/model"),
        max_length=16,
        options=options | {"num_beams": 2},
    )
    rows = [json.loads(line)["text"] for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    assert served.predict(rows)["text"].tolist() == saved.texts.tolist()
    for name in ("teacher", "student"):
        assert written_by(root / "evaluate/models" / name, rows) == texts_of(root, name)
    assert any("evaluate/models" in line for line in console.noted)
    # Other settings measure anew, train nothing, and leave what was trained as it was.
    trained = (root / "distill/model/generation_config.json").read_bytes()
    wider = settings["data"] | {"num_beams": 3, "no_repeat_ngram_size": 1}
    assert run(tmp_path, settings | {"data": wider}).ran == ["evaluate"]
    assert (root / "distill/model/generation_config.json").read_bytes() == trained
    told = json.loads((root / "evaluate/models/student/generation_config.json").read_text())
    assert (told["num_beams"], told["max_new_tokens"], told["no_repeat_ngram_size"]) == (3, 5, 1)
    assert written_by(root / "evaluate/models/student", rows) == texts_of(root, "student")
    # They are written again where files of theirs are lost, and nothing is measured anew.
    kept = (root / "evaluate/models/student/generation_config.json").read_bytes()
    (root / "evaluate/models/student/generation_config.json").unlink()
    (root / "evaluate/models/teacher/manifest.json").unlink()
    again = run(tmp_path, settings | {"data": wider})
    assert again.ran == [] and again.skipped[-1] == "evaluate"
    why = "evaluate: files of models/teacher, models/student are missing; written again"
    assert [line for line in again.warned if line.startswith("evaluate")] == [why]
    assert (root / "evaluate/models/student/generation_config.json").read_bytes() == kept
    assert written_by(root / "evaluate/models/student", rows) == texts_of(root, "student")
    whole = run(tmp_path, settings | {"data": wider})
    assert whole.ran == [] and why not in whole.warned


def written_by(directory: Path, rows: list[str]) -> list[str]:
    """What a model writes in plain use of transformers."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    sources = [f"summarize : {row}" for row in rows]
    inputs = tokenizer(sources, padding=True, return_tensors="pt")
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs)
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def texts_of(root: Path, name: str) -> list[str]:
    """What the report was made of."""
    texts = load_predictions(root / f"evaluate/predictions/{name}.npz").texts
    assert texts is not None
    return [str(text) for text in texts]


@pytest.mark.parametrize("router", ["sentence_gate", "hash_balanced"])
def test_bart_with_other_routers(tmp_path: Path, settings: dict[str, Any], router: str) -> None:
    own = settings | {
        "model": {"teacher": str(write_writer(tmp_path / "bart", "bart")), "max_length": 16},
        "moe": MOE | {"router": router, "partition": "importance"},
        "distill": {},
        "finetune": {"num_epochs": 0},
        "compare": ["dense"],
    }
    run(tmp_path, own)
    report = json.loads((tmp_path / "outputs/titles/report.json").read_text())
    assert np.isfinite(report["dense"]["metrics"]["rougeL"])
    assert report["differences"].keys() == {"teacher", "dense"}
    dense = tmp_path / "outputs/titles/evaluate/models/dense"
    assert default_output(dense, None) == tmp_path / "outputs/titles/export-dense"
    exported = export_task(dense, None, tmp_path / "exported").directory
    told = [json.loads((one / "generation_config.json").read_text()) for one in (dense, exported)]
    assert told[0] == told[1] and told[0]["num_beams"] == 2


def refusal(tmp_path: Path, settings: dict[str, Any]) -> str:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    config = load_config(recipe)
    with pytest.raises(ConversionError) as caught:
        check_before_start(config, Workspace(config, Recorder()))
    return str(caught.value)


def test_models_that_do_not_write_from_a_source_are_refused(
    tmp_path: Path, settings: dict[str, Any], tiny_bert: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.tasks.tiny_seq2seq import tiny_tokenizer

    torch.manual_seed(0)
    causal = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=28, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        causal
    )
    tiny_tokenizer("t5").save_pretrained(causal)
    for teacher, family in ((tiny_bert, "bert"), (causal, "gpt2")):
        own = settings | {"model": {"teacher": str(teacher), "max_length": 16}}
        text = refusal(tmp_path, own)
        assert f"of the family {family}, which has no model for data.kind=seq2seq" in text
        assert "choose an encoder-decoder, such as one of T5's or BART's kind" in text


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"distill": {"alignment_weight": 1}},
            r"distill\.alignment_weight=1 compares one vector of a whole sample",
        ),
        ({"distill": {"adversarial_weight": 1}}, r"distill\.adversarial_weight=1 compares one"),
        ({"data": {"metrics": "accuracy"}}, r"cannot measure data\.kind=seq2seq"),
        ({"data": {"num_beams": 1, "length_penalty": 2}}, r"data\.length_penalty is read by a"),
        ({"data": {"source_prefix": ["a: ", "b: "]}}, r"source_prefix=.* is for two texts"),
        (
            {"data": {"kind": "classification"}},
            r"data\.source_prefix belongs to data\.kind=seq2seq",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_when_the_recipe_is_read(
    tmp_path: Path, settings: dict[str, Any], changes: dict[str, Any], fault: str
) -> None:
    own = settings | {key: settings.get(key, {}) | value for key, value in changes.items()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(own))
    with pytest.raises(ConfigError, match=fault):
        load_config(recipe)
