"""Every shipped recipe loads, and says what its source says."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_dist.config import load_config
from pipelines.cli import app

RECIPES = Path(__file__).resolve().parents[2] / "pipelines" / "recipes"
# Neurons of the FFN's parts that comparisons are called by, where an FFN has 1,536.
SIZES = {"half": 768, "quarter": 384, "sixteenth": 96, "second": 48}

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
PAPER_SQUAD = {1: (3e-5, 32, 5, 0.01, 2), 2: (3e-5, 16, 4, 0.1, 1)}
TASKS = (*PAPER, "stsb")
# Router, experts, K, expert size, learning rate, batch size, epochs, weight decay; MEO, EMNLP 2023,
# and its scripts.
MERGED = {
    "meo_bert_sst2": ("merged_token", 8, 4, 3072, 1e-5, 16, 10, 0.1),
    "meo_gpt2_wikitext2": ("merged_task", 8, 2, 3072, 1e-5, 8, 10, 0),
    "meo_t5_squad": ("merged_sequence", 8, 8, 2048, 3e-5, 12, 2, 0),
    "meo_bart_xsum": ("merged_sequence", 8, 2, 4096, 1e-4, 8, 4, 0.1),
}
SMALL_TASKS = ("sst2", "mrpc", "qqp", "rte", "mnli")


def test_the_expected_recipes_are_there() -> None:
    expected = {"demo", "minilm_sst2", *(f"moebert_{task}" for task in TASKS)}
    expected |= {f"{kind}_{task}" for kind in ("microbert", "tinybert") for task in SMALL_TASKS}
    assert expected | {"microbert_minilm_sst2"} <= {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_comparisons_resolve(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    for label in config.compare:
        own = config.resolve_comparison(label).moe
        size = SIZES.get(label.rpartition("_")[2], config.moe.active_neurons)
        # A plain mixture pays for each of K experts, a merged one for one.
        assert own.active_neurons == (own.top_k if label == "plain" else 1) * size


def test_ablations_differ_in_their_comparisons_alone() -> None:
    """So that they share a teacher and a main student where they are run under one name."""
    paths = [RECIPES / f"ablation_{choice}.yaml" for choice in ("partitions", "routers", "sharing")]
    configs = [load_config(path, ("name=one",)) for path in paths]
    first, *others = (config.model_copy(update={"compare": {}}) for config in configs)
    assert all(other == first for other in others)


def test_the_ablation_of_sizes_has_a_dense_student_of_each() -> None:
    config = load_config(RECIPES / "ablation_size.yaml")
    for size in ("quarter", "sixteenth"):
        dense = config.resolve_comparison(f"dense_{size}").moe
        mixture = config.resolve_comparison(f"moe_{size}").moe
        assert dense.active_neurons == mixture.active_neurons
        assert (dense.num_experts, mixture.num_experts) == (1, config.moe.num_experts)


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, nothing cached, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOE_DIST_CACHE", str(tmp_path / "cache"))
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.usefixtures("bare_machine")
@pytest.mark.parametrize(
    "name",
    [
        "moebert_sst2",
        "minilm_sst2",
        "bert_squad1",
        "bert_squad2",
        "qa_minilm_files",
        "embedding_minilm",
        "embedding_files",
        "gpt2_wikitext2",
        "lm_smollm2",
        "lm_smollm2_bbc",
        "t5_squad",
        "bart_xsum",
        *MERGED,
        "meo_minilm_sst2",
        "meo_minilm_embedding",
        "meo_smollm2",
        "tiny_gpt2",
        "tiny_t5_titles",
        "tiny_bart_titles",
    ],
)
def test_a_dry_run_needs_neither_network_nor_data(name: str) -> None:
    result = CliRunner().invoke(app, ["compress", str(RECIPES / f"{name}.yaml"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "the recipe is valid" in result.output
    assert "not known: training steps" in result.output
    assert "not known: parameters" in result.output


@pytest.mark.usefixtures("bare_machine")
def test_data_files_that_are_not_there_are_one_error_with_both_names(tmp_path: Path) -> None:
    recipe = str(RECIPES / "minilm_sst2.yaml")
    result = CliRunner().invoke(app, ["compress", recipe, "--set", f"output_dir={tmp_path}/out"])
    assert result.exit_code == 2
    assert f"data.train={tmp_path}/train.tsv and data.dev={tmp_path}/dev.tsv" in result.output
    assert "--set data.train=FILE" in result.output
    assert not (tmp_path / "out").exists()


def test_a_recipe_for_files_trains_on_the_given_ones(tmp_path: Path) -> None:
    from moe_dist.data.sources import load_splits
    from moe_dist.jobs.job import row_arguments

    for name, count in (("train", 6), ("dev", 2)):
        rows = [f"sentence number {n} of {name}\t{n % 2}" for n in range(count)]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    files = [f"data.{name}={tmp_path}/{name}.tsv" for name in ("train", "dev")]
    config = load_config(RECIPES / "minilm_sst2.yaml", files)
    splits = load_splits(**row_arguments(config.data, config.seed))
    assert (len(splits.train), len(splits.dev)) == (6, 2)
    assert (splits.task.num_labels, splits.task.main_metric) == (2, "accuracy")


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


@pytest.mark.parametrize("name", MERGED)
def test_merged_recipes_have_the_published_settings(name: str) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    moe, train, distill = config.moe, config.train, config.distill
    experts = (moe.router, moe.num_experts, moe.top_k, moe.expert_size)
    settings = (train.learning_rate, train.batch_size, train.num_epochs, train.weight_decay)
    assert (*experts, *settings) == MERGED[name]
    assert (moe.partition, moe.merge_gates) == ("full_copy", "each")
    # The labels alone teach, and each gate's balance counts 1e-2 of a sum.
    assert (distill.task_weight, distill.hidden_weight, distill.kl_weight) == (1, 0, 0)
    assert distill.load_balancing_weight * 100 in (24, 48)


@pytest.mark.parametrize("version", PAPER_SQUAD)
def test_squad_recipes_have_the_paper_s_hyperparameters(version: int) -> None:
    config = load_config(RECIPES / f"bert_squad{version}.yaml")
    train, distill, moe = config.train, config.distill, config.moe
    settings = (train.learning_rate, train.batch_size, train.num_epochs, train.weight_decay)
    assert (*settings, distill.hidden_weight) == PAPER_SQUAD[version]
    assert distill.kl_weight == distill.hidden_weight and train.warmup_fraction == 0
    assert (moe.num_experts, moe.expert_size, moe.num_shared_neurons) == (4, 768, 512)
    assert (config.model.teacher, config.model.max_length) == ("bert-base-uncased", 384)
    assert config.data.kind == "question_answering"
    assert config.data.name == ("rajpurkar/squad_v2" if version == 2 else "rajpurkar/squad")


def test_the_demo_runs_expert_parallel_on_two_workers() -> None:
    config = load_config(RECIPES / "demo.yaml", ("compare=[dense]",))
    assert (config.parallel.num_workers, config.parallel.ep_size) == (2, 2)
    assert (config.moe.num_experts, config.moe.expert_size) == (8, 384)
    dense = config.resolve_comparison("dense")
    assert (dense.moe.num_experts, dense.moe.expert_size, dense.parallel.ep_size) == (1, 384, 1)


@pytest.mark.parametrize("task", SMALL_TASKS)
def test_small_students_have_the_published_shape(task: str) -> None:
    for kind in ("microbert", "tinybert"):
        config = load_config(RECIPES / f"{kind}_{task}.yaml")
        student = config.student
        assert (student.num_layers, student.hidden_size, student.intermediate_size) == (
            4,
            312,
            1200,
        )
        assert (student.num_heads, student.layer_map) == (12, "uniform")
        assert (config.model.teacher, config.data.subset) == ("bert-base-uncased", task)
    assert config.moe.num_experts == 1 and config.moe.expert_size == 1200
    assert config.distill.attention_weight > 0 and config.distill.task_weight == 0
    micro = load_config(RECIPES / f"microbert_{task}.yaml")
    assert micro.distill.adversarial_weight > 0 and micro.distill.alignment_weight > 0
    moe = micro.moe
    private = moe.expert_size - moe.num_shared_neurons
    assert moe.num_shared_neurons + moe.num_experts * private == 1200


@pytest.mark.parametrize(
    "path", sorted((RECIPES / "search").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_search_recipe_loads_and_has_a_space(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.search.space


def test_the_expected_spaces_are_there() -> None:
    expected = {"router", "sharing", "loss_weights", "all"}
    assert expected <= {path.stem for path in (RECIPES / "search").glob("*.yaml")}
