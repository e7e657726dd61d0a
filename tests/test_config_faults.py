"""Recipes: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.config import build_config, load_config
from moe_dist.errors import ConfigError
from tests.config_recipes import RECIPE, faults, only_fault

# Files that are no recipes


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    fault = only_fault(tmp_path, text="name: x\nmodel: {teacher: y\ndata: [\n")
    assert "line 3" in fault


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    fault = only_fault(tmp_path, text=RECIPE + "name: again\n")
    assert "line 8" in fault
    assert "'name' is given twice" in fault


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"- a\n- b\n", "not a mapping"),
        (b"name: caf\xe9\n", "byte 9 is not UTF-8"),
        (b"name: !!python/object/apply:os.system [true]\n", "not valid YAML"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(path)


def test_a_missing_recipe_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml.*\n.*does not exist"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["moe.top_k", "=2", "moe..top_k=2", "moe.layers=[0"])
def test_a_broken_override_is_named(tmp_path: Path, override: str) -> None:
    assert repr(override) in only_fault(tmp_path, override)


# Faults of single keys


def test_an_unknown_key_gets_a_guess(tmp_path: Path) -> None:
    fault = only_fault(tmp_path, "moe.num_expert=4")
    assert fault.startswith("moe.num_expert is an unknown key; keys of moe: num_experts,")
    assert fault.endswith("Did you mean num_experts?")


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    assert only_fault(tmp_path, "moe.ep_size=2").endswith("Did you mean parallel.ep_size?")
    assert only_fault(tmp_path, "zero_stage=1").endswith("Did you mean parallel.zero_stage?")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=a/b", "name=a/b cannot name a directory"),
        ("name=..", "name=.. cannot name a directory"),
        ("data={source: hub, name: 7}", "data.name=7 is not text"),
        ("seed=true", "seed=true is not a whole number"),
        ("seed=-1", "seed=-1 is not at least 0"),
        ("moe.top_k='2'", "moe.top_k='2' is not a whole number"),
        ("moe.top_k=1.5", "moe.top_k=1.5 is not a whole number"),
        ("moe.tie_shared=1", "moe.tie_shared=1 is not true or false"),
        ("moe.layers=[]", "moe.layers=[] is empty"),
        ("moe.layers=3", "moe.layers=3 is not a list"),
        ("moe.partition=importence", "Did you mean importance?"),
        ("train.learning_rate=fast", "train.learning_rate=fast is not a number"),
        ("train.learning_rate=.nan", "train.learning_rate=.nan is not a finite number"),
        ("distill.temperature=1e-320", "distill.temperature=1.0e-320 is too close to 0"),
        ("train.learning_rate=true", "train.learning_rate=true is not a number"),
        ("train.learning_rate=0", "train.learning_rate=0 is not greater than 0"),
        ("train.warmup_fraction=1", "train.warmup_fraction=1 is not less than 1"),
        ("data.text_columns=[a, b, c]", "at most 2"),
        ("data.dev_size=10.5", "neither a fraction nor a number of rows"),
        ("data.metrics=[acuracy]", "Did you mean accuracy?"),
        ("data.label_names=[yes, true]", "is not text"),
        ("parallel.zero_stage=3", "parallel.zero_stage=3 cannot spread experts"),
        ("parallel.cpus_per_worker=0", "parallel.cpus_per_worker=0 is not at least 1"),
        ("parallel.cpus_per_worker=65537", "is not at most 65,536"),
        ("parallel.cpus_per_worker=1.5", "1.5 is neither a whole number nor auto"),
        ("parallel.cpus_per_worker=true", "true is neither a whole number nor auto"),
        ("parallel.cpus_per_worker=all", "all is neither a whole number nor auto"),
        ("parallel.use_gpu=maybe", "use one of auto, true, false"),
        ("distill=5", "distill=5 is not a section with keys"),
        ("model.teacher=null", "model.teacher=null is not text"),
        ("compare=5", "compare=5 is not a mapping"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(tmp_path: Path, override: str, words: str) -> None:
    assert words in only_fault(tmp_path, override)


@pytest.mark.parametrize("section", ["export"])
def test_sections_that_are_not_built_are_refused(tmp_path: Path, section: str) -> None:
    assert "not built yet; remove the section" in only_fault(tmp_path, f"{section}={{}}")


def test_missing_keys_are_named(tmp_path: Path) -> None:
    found = faults(tmp_path, text="seed: 1\nmodel: {}\n")
    assert [fault.split(" ")[0] for fault in found] == ["name", "model.teacher", "data"]
    assert all("is missing" in fault for fault in found)


# Rules across keys


def test_experts_over_ranks_in_the_words_of_the_design(tmp_path: Path) -> None:
    fault = only_fault(
        tmp_path, "moe.num_experts=6", "parallel.ep_size=4", "parallel.num_workers=4"
    )
    assert fault == (
        "moe.num_experts=6 is not divisible by parallel.ep_size=4; "
        "use 4 or 8 experts, or ep_size 1, 2, 3 or 6."
    )


FILES: dict[str, Any] = {"source": "files", "train": "a.tsv"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"moe": {"num_experts": 2}, "parallel": {"num_workers": 4, "ep_size": 4}},
            "use 4 experts, or ep_size 1 or 2.",
        ),
        (
            {"parallel": {"num_workers": 3, "ep_size": 2}},
            "parallel.num_workers=3 is not divisible by parallel.ep_size=2; use 4 workers, or "
            "ep_size 1 or 3.",
        ),
        ({"moe": {"top_k": 5}}, "moe.top_k=5 is more than moe.num_experts=4"),
        (
            {"moe": {"partition": "token_clusters"}},
            "set moe.router to token_gate, or use importance",
        ),
        (
            {"moe": {"fit_output": True, "top_k": 2}},
            "set top_k to 1, or fit_output to auto or false",
        ),
        ({"moe": {"num_shared_neurons": 800}}, "more than moe.expert_size=768"),
        ({"moe": {"tie_shared": True, "num_shared_neurons": 0}}, "has nothing to tie"),
        ({"moe": {"tie_shared": True, "num_experts": 1}}, "needs several experts"),
        ({"moe": {"layers": [1, 1]}}, "names a layer twice"),
        ({"moe": {"layers": [-1]}}, "numbered from 0"),
        ({"distill": {"load_balancing_weight": 0.1}}, "load_balancing_weight=0.1 has no gate"),
        ({"distill": {"z_loss_weight": 0.1}}, "z_loss_weight=0.1 has no gate"),
        ({"distill": {"entropy_weight": 0.1}}, "entropy_weight=0.1 has no gate"),
        ({"moe": {"gate_noise": 0.5}}, "moe.gate_noise=0.5 has no gate"),
        (
            {"moe": {"router": "task_gate", "task_map": "fixed", "gate_noise": 0.5}},
            "moe.router=task_gate and moe.task_map=fixed",
        ),
        ({"moe": {"router": "task_gate", "gate_jitter": 0.1}}, "use moe.gate_noise"),
        (
            {"distill": {"task_weight": 0, "hidden_weight": 0, "kl_weight": 0}},
            "learns nothing",
        ),
        (
            {"train": {"batch_size": 6, "accumulation": 4}, "parallel": {"num_workers": 2}},
            "use batch_size 8 or more, accumulation 3, or fewer workers.",
        ),
        (
            {"finetune": {"batch_size": 1}, "parallel": {"num_workers": 2}},
            "finetune.batch_size=1 leaves micro-batches empty",
        ),
        (
            {"parallel": {"launcher": "local", "num_workers": 2}},
            "parallel.launcher=local is one process",
        ),
        ({"tracking": {"uri": "./mlruns"}}, "is no store that MLflow keeps"),
        ({"tracking": {"uri": "databricks://work"}}, "is no path, which names of experiments"),
        (
            {"tracking": {"register_model": "x", "log_models": False}},
            "tracking.log_models=false logs none",
        ),
        ({"tracking": {"register_model": "x", "enabled": False}}, "tracking.enabled=false logs"),
        ({"tracking": {"register_model": "a/b"}}, "holds a slash or a colon"),
        ({"output_dir": "s3://key:word@bucket/out"}, "output_dir holds a user or a password"),
        (
            {"data": {**FILES, "dev": "s3://key:word@bucket/dev.tsv"}},
            "data.dev holds a user or a password",
        ),
        ({"data": {"source": "hub"}}, "data.name is missing"),
        ({"data": {"source": "files", "dev_size": 0.1}}, "data.train is missing"),
        ({"data": FILES}, "data.dev and data.dev_size are both missing"),
        ({"data": {**FILES, "dev": "b.tsv", "dev_size": 5}}, "keep one of them"),
        ({"data": {**FILES, "dev": "b.tsv", "subset": "x"}}, "data.subset belongs to"),
        ({"data": {"source": "package", "name": "x", "train": "t"}}, "data.train belongs to"),
        (
            {"data": {**FILES, "dev_size": 5, "kind": "regression", "label_names": ["a"]}},
            "data.label_names names classes",
        ),
        (
            {"data": {**FILES, "dev_size": 5, "kind": "regression", "metrics": "accuracy"}},
            "use pearson or spearman",
        ),
        (
            {
                "data": {**FILES, "dev_size": 5, "kind": "embedding", "metrics": "accuracy"},
                "finetune": {"num_epochs": 0},
                "distill": {"task_weight": 0},
            },
            "cannot measure data.kind=embedding; use cosine_spearman, cosine_pearson, recall_at_1",
        ),
        (
            {
                "data": {
                    **FILES,
                    "dev_size": 5,
                    "kind": "causal_lm",
                    "metrics": ["perplexity", "f1"],
                }
            },
            "data.metrics=['f1'] cannot measure data.kind=causal_lm; use perplexity, word_perp",
        ),
        (
            {"data": {**FILES, "dev_size": 5, "kind": "seq2seq", "label_names": ["a", "b"]}},
            "data.kind=seq2seq has none",
        ),
        (
            {"data": {**FILES, "dev_size": 5, "kind": "causal_lm", "positive_label": "a"}},
            "data.kind=causal_lm has none",
        ),
        ({"data": {**FILES, "dev_size": 5, "text_columns": ["a", "a"]}}, "holds a name twice"),
    ],
)
def test_a_broken_rule_is_the_only_fault(changes: dict[str, Any], words: str) -> None:
    raw = {**yaml.safe_load(RECIPE), **changes}
    with pytest.raises(ConfigError) as caught:
        build_config(raw)
    assert len(caught.value.faults) == 1, caught.value.faults
    assert words in caught.value.faults[0]


def test_all_faults_come_at_once_and_rules_run_beside_faulty_keys(tmp_path: Path) -> None:
    found = faults(
        tmp_path,
        "modle.teacher=x",
        "moe.num_experts=6",
        "moe.top_k=many",
        "moe.num_shared_neurons=800",
        "parallel.ep_size=4",
        "parallel.num_workers=4",
        "train.learning_rate=fast",
        "train.batch_size=2",
    )
    starts = [
        "modle",
        "moe.top_k=many",
        "train.learning_rate=fast",
        "moe.num_experts=6",
        "moe.num_shared_neurons=800",
        "train.batch_size=2",
    ]
    for start in starts:
        assert sum(fault.startswith(start) for fault in found) == 1, (start, found)
    assert len(found) == len(starts), found


def test_a_rule_is_silent_where_its_own_key_is_at_fault(tmp_path: Path) -> None:
    found = faults(tmp_path, "moe.num_experts=six", "parallel.ep_size=4", "parallel.num_workers=4")
    assert len(found) == 1
