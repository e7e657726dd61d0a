"""Comparisons in a recipe: what they inherit, what they may change, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_dist.config import load_config
from moe_dist.errors import ConfigError
from tests.config_recipes import RECIPE, load, only_fault, write


def test_dense_is_one_expert_of_the_same_active_size(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "compare=[dense]",
        "moe={expert_size: 384, num_shared_neurons: 256, tie_shared: true, top_k: 2}",
        "moe.router=token_gate",
        "moe.partition=random",
        "moe.gate_noise=0.1",
        "moe.capacity_factor=1.25",
        "distill.load_balancing_weight=0.1",
        "distill.entropy_weight=0.1",
        "train.expert_learning_rate_scale=2",
        "parallel={num_workers: 2, ep_size: 2}",
    )
    dense = config.resolve_comparison("dense")
    assert config.moe.active_neurons == 256 + 2 * 128
    assert dense.moe.active_neurons == dense.moe.expert_size == 512
    assert (dense.moe.num_experts, dense.moe.top_k, dense.moe.num_shared_neurons) == (1, 1, 0)
    assert dense.moe.tie_shared is False
    assert dense.moe.partition == "importance"
    assert (dense.parallel.num_workers, dense.parallel.ep_size) == (2, 1)
    assert dense.distill.load_balancing_weight == dense.distill.entropy_weight == 0
    assert dense.train.expert_learning_rate_scale == 1
    assert dense.compare == {}
    assert (dense.name, dense.run_dir, dense.data) == (config.name, config.run_dir, config.data)


def test_untied_active_size_counts_every_chosen_expert(tmp_path: Path) -> None:
    config = load(tmp_path, "compare=dense", "moe.top_k=2")
    assert config.resolve_comparison("dense").moe.expert_size == 2 * 768


def test_a_comparison_is_fitted_only_if_the_student_is(tmp_path: Path) -> None:
    compare = (
        "compare={dense: {}, one: {moe.top_k: 1}, fitted: {moe.top_k: 1, moe.fit_output: true}}"
    )
    for main, fits in (("moe.top_k=2", False), ("moe.fit_output=false", False), ("seed=1", True)):
        config = load(tmp_path, compare, main)
        assert config.moe.fits_output is fits
        for label in ("dense", "one"):
            assert config.resolve_comparison(label).moe.fits_output is fits, (main, label)
        assert config.resolve_comparison("fitted").moe.fits_output


def test_comparisons_take_nested_and_dotted_overrides_and_more_from_the_command_line(
    tmp_path: Path,
) -> None:
    text = RECIPE + (
        "compare:\n  dense:\n  gate: {moe.router: token_gate, train: {num_epochs: 7}}\n"
    )
    config = load_config(write(tmp_path, text), ["compare.gate.moe.top_k=2"])
    gate = config.resolve_comparison("gate")
    assert (gate.moe.router, gate.moe.top_k, gate.train.num_epochs) == ("token_gate", 2, 7)
    assert config.moe.top_k == 1
    assert list(config.compare) == ["dense", "gate"]


def test_a_comparison_keeps_the_teacher_of_the_main_run(tmp_path: Path) -> None:
    config = load(
        tmp_path, "train.learning_rate=1e-5", "compare={fast: {train.learning_rate: 1e-3}}"
    )
    fast = config.resolve_comparison("fast")
    assert fast.train.learning_rate == 1e-3
    assert fast.teacher_train.learning_rate == config.teacher_train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("compare", "words"),
    [
        ("[dens]", "compare.dens changes nothing and is not built in"),
        ("{x: {data.name: other}}", "compare.x.data.name cannot differ"),
        ("{x: {finetune: {num_epochs: 1}}}", "compare.x.finetune cannot differ"),
        ("{x: {moe.top_k: 9}}", "compare.x: moe.top_k=9 is more than moe.num_experts=4"),
        ("{x: {moe.topk: 2}}", "compare.x: moe.topk is an unknown key"),
        ("{../x: {moe.top_k: 2}}", "compare.../x cannot name a directory"),
        ("{x: 3}", "compare.x=3 is not a mapping"),
    ],
)
def test_a_wrong_comparison_is_named(tmp_path: Path, compare: str, words: str) -> None:
    assert words in only_fault(tmp_path, f"compare={compare}")


def test_an_unknown_comparison_cannot_be_resolved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.gate is not in the recipe; it has: dense"):
        load(tmp_path, "compare=[dense]").resolve_comparison("gate")
