"""Sizes that --dry-run derives agree with what conversion and training really make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import ConfigError, ConversionError, MoeDistError
from pipelines.chain.workspace import Workspace
from pipelines.checks.sizes import (
    dense_skeleton,
    derive_sizes,
    length_faults,
    memory_per_rank,
    refuse_misfits,
)
from pipelines.console import Console

Write = Callable[[dict[str, Any]], Path]


def test_parameters_equal_those_of_a_converted_model(
    write_recipe: Write, tiny_settings: dict[str, Any], tiny_bert: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from moe_dist.conversion import dense_to_moe, plan_partition

    config = load_config(write_recipe(tiny_settings))
    sizes = derive_sizes(config, Workspace(config, Console(quiet=True)))
    teacher = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    plan = plan_partition(
        [torch.rand(32), torch.rand(32)], num_experts=2, expert_size=16, num_shared_neurons=8
    )
    student = dense_to_moe(teacher, plan)
    assert [model.total for model in sizes.models] == [
        sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)
    ]
    assert sizes.models[1].ffn_flops_per_token == sizes.models[0].ffn_flops_per_token / 2
    assert not sizes.unknown


@pytest.mark.parametrize(
    ("router", "said"),
    [
        (
            "hash_random",
            "2.0 of 2 in each layer by a text of 16 tokens, since hash_random chooses for each "
            "token (taken to be used evenly): 1.1 k of 1.1 k expert weights; a router that chooses "
            "once for a text (sentence_gate, task_gate) reads 560",
        ),
        (
            "sentence_gate",
            "1 of 2 in each layer, since sentence_gate chooses once for a text: 560 of 1.1 k "
            "expert weights",
        ),
    ],
)
def test_a_dry_run_says_what_a_router_reads_at_batch_1(
    write_recipe: Write, tiny_settings: dict[str, Any], router: str, said: str
) -> None:
    # Experts of 8 private neurons beside 8 shared ones, in two layers of width 16: 2 · 2 · (2 ·
    # 16 · 8 + 8 + 16) weights.
    tiny_settings["moe"] |= {"router": router, "tie_shared": True}
    tiny_settings["compare"] = ["dense"]
    tiny_settings["evaluate"] = {"require_speedup": 3}
    config = load_config(write_recipe(tiny_settings))
    facts = dict(derive_sizes(config, Workspace(config, Console(quiet=True))).facts)
    assert facts["experts read at batch 1"] == said
    assert "experts read at batch 1, dense" not in facts
    assert facts["speed-up that is required"].startswith("3 ×; FLOPs say 1.")
    assert facts["speed-up that is required"].endswith(
        "so it can hardly be had: smaller experts, or a smaller student"
    )


def test_recomputation_that_a_family_lacks_is_refused(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    from tests.conversion.dense_models import tiny_model

    tiny_settings["train"]["gradient_checkpointing"] = True
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(ConversionError, match=r"^train\.gradient_checkpointing: .*MPNet"):
        dense_skeleton(tiny_model("mpnet"), config)
    dense_skeleton(tiny_model("bert"), config)


def test_segments_of_an_encoder_are_refused(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    from tests.conversion.dense_models import tiny_model

    tiny_settings["moe"] |= {"router": "merged_sequence", "segment_length": 4}
    tiny_settings["compare"] = {"token": {"moe.router": "merged_token"}}
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(ConfigError) as caught:
        refuse_misfits(tiny_model("bert"), config)
    (fault,) = caught.value.faults
    assert fault.startswith("moe.segment_length=4 divides what a decoder reads")
    for family in ("gpt2", "t5"):
        refuse_misfits(tiny_model(family), config)


@pytest.mark.parametrize(
    ("stage", "num_workers", "ep_size", "copies_of_all", "copies_of_experts"),
    [(0, 1, 1, 4.0, 4.0), (1, 2, 1, 3.0, 3.0), (2, 2, 1, 2.5, 2.5), (1, 2, 2, 3.0, 2.0)],
)
def test_memory_follows_zero_and_expert_parallelism(
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    stage: int,
    num_workers: int,
    ep_size: int,
    copies_of_all: float,
    copies_of_experts: float,
) -> None:
    from torch import nn

    tiny_settings["parallel"] = {
        "zero_stage": stage,
        "num_workers": num_workers,
        "ep_size": ep_size,
    }
    config = load_config(write_recipe(tiny_settings))
    model = nn.ModuleDict(
        {
            "dense": nn.Linear(10, 10, bias=False),
            "moe": nn.ModuleDict({"experts": nn.Linear(20, 10, bias=False)}),
        }
    )
    expected = 4 * (1000 + 100 * copies_of_all + 200 * copies_of_experts)
    assert memory_per_rank(model, config, frozen=1000) == expected


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ({"max_position_embeddings": 16}, True),
        ({"max_position_embeddings": 15}, False),
        ({"max_position_embeddings": None}, True),
        ({"max_position_embeddings": -1}, True),
        ({}, True),
        ({"model_type": "roberta", "max_position_embeddings": 18, "pad_token_id": 1}, True),
        ({"model_type": "roberta", "max_position_embeddings": 17, "pad_token_id": 1}, False),
        ({"model_type": "roberta", "max_position_embeddings": 17, "pad_token_id": 0}, True),
        ({"model_type": "mpnet", "max_position_embeddings": 17, "pad_token_id": 0}, False),
    ],
)
def test_a_sentence_may_be_as_long_as_the_model_has_positions(
    write_recipe: Write, tiny_settings: dict[str, Any], limits: dict[str, Any], fits: bool
) -> None:
    config = load_config(write_recipe(tiny_settings))
    model = SimpleNamespace(config=SimpleNamespace(**limits))
    assert (length_faults(model, config) == []) is fits


def test_positions_that_padding_takes_are_named(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["model"]["max_length"] = 514
    limits = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}
    model = SimpleNamespace(config=SimpleNamespace(**limits))
    (fault,) = length_faults(model, load_config(write_recipe(tiny_settings)))
    assert "more than the 512 positions that the model has (514 less 2, up to that of" in fault
    assert "set it to 512 or less" in fault


def test_memory_of_an_elastic_run_is_that_of_its_fewest_workers(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    from torch import nn

    model = nn.Linear(10, 10, bias=False)

    def memory(num_workers: int | list[int]) -> float:
        tiny_settings["parallel"] = {"num_workers": num_workers, "zero_stage": 2}
        return memory_per_rank(model, load_config(write_recipe(tiny_settings)), frozen=0)

    assert memory([2, 4]) == memory(2) > memory(4)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("./no/such/model", "no such model directory"),
        ("package:nothing", "is no model package"),
        ("scratch:nothing", "nothing"),
    ],
)
def test_a_start_model_that_cannot_exist_is_a_fault_of_a_dry_run(
    write_recipe: Write, tiny_settings: dict[str, Any], teacher: str, message: str
) -> None:
    tiny_settings["model"]["teacher"] = teacher
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(MoeDistError, match=message):
        derive_sizes(config, Workspace(config, Console(quiet=True)))


def test_a_start_model_that_is_out_of_reach_is_not_known(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_settings["model"]["teacher"] = "nobody/has-this-model"
    config = load_config(write_recipe(tiny_settings))
    sizes = derive_sizes(config, Workspace(config, Console(quiet=True)))
    assert any("nobody/has-this-model" in line for line in sizes.unknown)


def read_running_text(settings: dict[str, Any], path: Path) -> None:
    path.write_text("the film was good\n" * 30)
    settings["data"] = {
        "source": "files",
        "kind": "causal_lm",
        "train": str(path),
        "dev": str(path),
    }
    settings["finetune"] = {"num_epochs": 0}


def test_a_dry_run_finds_what_costs_nothing_before_it_tokenises(
    tmp_path: Path, write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: Any
) -> None:
    """An encoder has no end token either, which would be said once blocks are made."""
    from pipelines.checks.sizes import checked_sizes

    read_running_text(tiny_settings, tmp_path / "text.txt")

    def tokenised(*args: object) -> Any:
        raise AssertionError("tokenised before the model was looked at")

    monkeypatch.setattr(Workspace, "_encode", tokenised)
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(ConversionError, match="is an encoder"):
        checked_sizes(config, Workspace(config, Console(quiet=True)))


def test_a_fault_of_a_comparison_bears_its_name(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    tiny_settings["compare"] = {"large": {"moe.expert_size": 64}}
    config = load_config(write_recipe(tiny_settings))
    with pytest.raises(ConfigError) as caught:
        derive_sizes(config, Workspace(config, Console(quiet=True)))
    (fault,) = caught.value.faults
    assert fault.startswith("compare.large: ")


def test_steps_that_need_a_tokenizer_out_of_reach_are_not_known(
    tmp_path: Path,
    write_recipe: Write,
    tiny_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pipelines.checks.sizes import checked_sizes

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny_settings["model"]["teacher"] = "nobody/has-this-model"
    read_running_text(tiny_settings, tmp_path / "text.txt")
    config = load_config(write_recipe(tiny_settings))
    sizes = checked_sizes(config, Workspace(config, Console(quiet=True)))
    assert not any(name.startswith("steps") for name, _ in sizes.facts)
    assert any(line.startswith("training steps: they need the tokenizer") for line in sizes.unknown)
