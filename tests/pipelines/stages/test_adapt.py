"""Every router and partition can be named in a recipe, and gets what it reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.conversion import PARTITIONS
from moe_dist.moe import ROUTERS, MoELayer
from pipelines.chain.chain import run_chain
from pipelines.chain.workspace import Workspace
from pipelines.checks.sizes import derive_sizes
from pipelines.console import Console
from pipelines.stages.adapt import adapt_settings
from tests.pipelines.recorder import Recorder

Write = Callable[[dict[str, Any]], Path]


# The other one needs several tasks: test_tasks.py.
ONE_TASK = [name for name, method in PARTITIONS.items() if method.reads != "tasks"]


def students() -> dict[str, dict[str, Any]]:
    """Settings for each row of both tables, two rows at a time."""
    found: dict[str, dict[str, Any]] = {}
    for split, router in itertools.zip_longest(ONE_TASK, ROUTERS, fillvalue="hash_random"):
        found[f"{split}-{router}"] = {"partition": split, "router": router}
        if split == "full_copy":
            found[f"{split}-{router}"] |= {"expert_size": 32}
        if split == "token_clusters":
            # Neurons may serve several experts: 40 where there are 32.
            found[f"{split}-{router}"] |= {"router": "token_gate", "expert_size": 24}
    return found


def test_the_chain_adapts_with_every_router_and_partition(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    from moe_dist.conversion import PartitionPlan
    from moe_dist.inference import load_model

    splits = set()
    for name, moe in students().items():
        config = load_config(write_recipe(tiny_settings | {"moe": {**tiny_settings["moe"], **moe}}))
        run_chain(config, Recorder(), until="adapt")
        directory = Path(config.run_dir) / "adapt"
        model = load_model(directory / "model")
        assert model.config.moe["router"] == config.moe.router
        plan = PartitionPlan.load(directory / "plan.json")
        assert plan.method == config.moe.partition
        splits.add(json.dumps(plan.to_dict()["partitions"]))
        if config.moe.router == "hash_balanced":
            counts = token_counts(config)
            for layer in (one for one in model.modules() if isinstance(one, MoELayer)):
                loads = counts.new_zeros(2).index_add_(0, layer.router.table, counts)
                assert abs(int(loads[0] - loads[1])) <= int(counts.max()), name
    assert len(splits) == len(ONE_TASK)


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"router": "hash_balanced", "fit_output": False},
        {"partition": "clustered_importance", "fit_output": False},
        {"partition": "token_clusters", "router": "token_gate", "fit_output": False},
    ],
)
def test_what_training_rows_decided_is_redone_with_other_rows(
    write_recipe: Write, tiny_settings: dict[str, Any], moe: dict[str, Any]
) -> None:
    settings = tiny_settings | {"moe": {**tiny_settings["moe"], **moe}}
    config = load_config(write_recipe(settings))
    run_chain(config, Recorder(), until="adapt")
    again = Recorder()
    run_chain(config, again, until="adapt")
    assert "adapt" in again.skipped
    read = json.loads((Path(config.run_dir) / "adapt" / "started.json").read_text())
    assert set(read["inputs"]) == {"teacher", "scores", "data"}
    assert read["settings"]["max_length"] == config.model.max_length


def token_counts(config: Any) -> Any:
    """Counted over the whole training set, in one loop."""
    import torch

    from moe_dist.inference.saving import load_tokenizer

    workspace = Workspace(config, Console(quiet=True))
    tokenizer = load_tokenizer(Path(config.run_dir) / "finetune-teacher" / "model")
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    for row in workspace.splits.train:
        for token_id in tokenizer(row["text_a"])["input_ids"]:
            counts[token_id] += 1
    return counts


def test_a_dry_run_knows_the_size_of_every_student(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    compare = {
        name: {f"moe.{key}": value for key, value in moe.items()}
        for name, moe in students().items()
    }
    config = load_config(write_recipe(tiny_settings | {"compare": compare}))
    sizes = derive_sizes(config, Workspace(config, Console(quiet=True)))
    by_name = {model.name: model.total for model in sizes.models}
    gate = 2 * 2 * 16
    assert by_name["inverse-token_gate"] == by_name["kmeans-sentence_gate"]
    assert by_name["inverse-token_gate"] == by_name["random-hash_balanced"] + gate
    assert by_name["random-hash_balanced"] == by_name["student"]


@pytest.mark.parametrize(
    ("override", "changes"),
    [
        ("moe.gate_noise=0.5", True),
        ("moe.capacity_factor=1.25", True),
        ("moe.gate_noise=0", False),
        ("[moe.fit_output=false, moe.importance_samples=7]", False),
        ("[moe.fit_output=false, model.max_length=15]", False),
        ("[moe.fit_output=false, moe.partition=coactivation, moe.importance_samples=7]", True),
        ("[moe.top_k=2, moe.fit_output=false]", False),
        ("moe.fit_output=true", False),
        ("moe.fit_output=false", True),
        ("moe.importance_samples=7", True),
        ("[moe.num_experts=1, moe.fit_output=false]", True),
        ("moe.combine=dispatch", False),
        ("moe.segment_length=7", False),
        ("moe.merge_gates=one", False),
        ("[moe.router=merged_sequence, moe.segment_length=7]", True),
        ("[moe.router=merged_sequence, moe.merge_gates=one]", True),
        ("[moe.router=merged_sequence, moe.combine=merge]", False),
    ],
)
def test_what_an_untrained_student_depends_on(
    write_recipe: Write, tiny_settings: dict[str, Any], override: str, changes: bool
) -> None:
    tiny_settings["moe"] |= {"router": "token_gate"}
    recipe = write_recipe(tiny_settings)
    overrides = tuple(override.strip("[]").split(", "))
    before = adapt_settings(load_config(recipe, overrides[:-1]))
    assert (adapt_settings(load_config(recipe, overrides)) != before) is changes
