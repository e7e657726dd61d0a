"""What --dry-run says about expert groups and ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from pipelines.checks.topology_facts import cpus_fact, topology_facts

Write = Callable[[dict[str, Any]], Path]


def facts(
    write_recipe: Write, settings: dict[str, Any], num_experts: int, **parallel: Any
) -> dict[str, str]:
    moe = {"num_experts": num_experts, "expert_size": 16, "num_shared_neurons": 0}
    config = load_config(write_recipe(settings | {"moe": moe, "parallel": parallel}))
    return dict(topology_facts(config))


def test_topology_names_the_groups(write_recipe: Write, tiny_settings: dict[str, Any]) -> None:
    assert facts(write_recipe, tiny_settings, 4, num_workers=4, ep_size=2, zero_stage=1) == {
        "4 workers": "data parallel 4, expert parallel 2 (ranks 0-1, 2-3 share the experts), "
        "expert data parallel 2 (ranks 0+2, 1+3 hold the same)",
        "ZeRO": "stage 1, optimizer states spread over 4 ranks, those of the experts over 2",
    }
    assert facts(write_recipe, tiny_settings, 2) == {
        "1 worker": "data parallel 1, expert parallel 1, expert data parallel 1",
        "ZeRO": "stage 0, every rank keeps all gradients and optimizer states of its parameters",
    }
    alone = facts(write_recipe, tiny_settings, 2, zero_stage=2)
    assert alone["ZeRO"].startswith("stage 2, of no use with one worker")


def test_topology_of_every_number_of_workers(
    write_recipe: Write, tiny_settings: dict[str, Any]
) -> None:
    told = facts(write_recipe, tiny_settings, 4, num_workers=[2, 4], ep_size=4)
    sizes = {name: text.split(", ")[1] for name, text in told.items() if "worker" in name}
    assert sizes == {
        "4 workers": "expert parallel 4 (ranks 0-3 share the experts)",
        "3 workers": "expert parallel 1",
        "2 workers": "expert parallel 2 (ranks 0-1 share the experts)",
    }
    many = facts(write_recipe, tiny_settings, 4, num_workers=[1, 8])
    assert list(many) == ["8 workers", "1 worker", "ZeRO"]


def test_how_many_cpus_auto_is(
    write_recipe: Write, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    recipe = write_recipe(tiny_settings)
    assert cpus_fact(load_config(recipe)) == "3 (auto)"
    assert cpus_fact(load_config(recipe, ["parallel.cpus_per_worker=2"])) == "2"
