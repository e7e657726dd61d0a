"""Every shipped recipe loads, and says what its source says."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.config import load_config

RECIPES = Path(__file__).resolve().parents[2] / "pipelines" / "recipes"

# Learning rate, batch size, epochs, weight decay, distillation weight; MoEBERT, NAACL 2022.
PAPER = {
    "rte": (1e-5, 8, 10, 0.01, 1),
    "cola": (2e-5, 8, 10, 0, 3),
    "mrpc": (3e-5, 8, 5, 0, 2),
    "sst2": (2e-5, 16, 5, 0, 1),
    "qnli": (2e-5, 32, 5, 0, 2),
    "qqp": (3e-5, 64, 5, 0, 1),
    "mnli": (5e-5, 64, 5, 0, 5),
}
TASKS = (*PAPER, "stsb")


def test_the_expected_recipes_are_there() -> None:
    expected = {"demo", *(f"moebert_{task}" for task in TASKS)}
    assert expected <= {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_comparisons_resolve(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    for label in config.compare:
        assert config.resolve_comparison(label).moe.active_neurons == config.moe.active_neurons


@pytest.mark.parametrize("task", TASKS)
def test_moebert_recipes_have_the_paper_s_layers(task: str) -> None:
    config = load_config(RECIPES / f"moebert_{task}.yaml")
    moe = config.moe
    assert (moe.num_experts, moe.expert_size, moe.num_shared_neurons) == (4, 768, 512)
    assert (moe.router, moe.top_k, moe.partition, moe.tie_shared) == (
        "hash_random",
        1,
        "importance",
        False,
    )
    assert config.model.teacher == "bert-base-uncased"
    assert (config.data.source, config.data.subset) == ("hub", task)


@pytest.mark.parametrize("task", PAPER)
def test_moebert_recipes_have_the_paper_s_hyperparameters(task: str) -> None:
    config = load_config(RECIPES / f"moebert_{task}.yaml")
    train, distill = config.train, config.distill
    settings = (train.learning_rate, train.batch_size, train.num_epochs, train.weight_decay)
    assert (*settings, distill.hidden_weight) == PAPER[task]
    assert distill.kl_weight == distill.hidden_weight
    assert (train.max_grad_norm, train.warmup_fraction, distill.temperature) == (1, 0, 1)


def test_the_demo_runs_expert_parallel_on_two_workers() -> None:
    config = load_config(RECIPES / "demo.yaml")
    assert (config.parallel.num_workers, config.parallel.ep_size) == (2, 2)
    assert (config.moe.num_experts, config.moe.expert_size) == (4, 384)
    assert "dense" in config.compare
