"""Recipes of several tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import build_config, load_config
from moe_dist.errors import ConfigError

TASKS: dict[str, Any] = {
    "sst2": {"source": "files", "train": "a.tsv", "dev": "b.tsv"},
    "mrpc": {"source": "hub", "name": "nyu-mll/glue", "subset": "mrpc"},
}


def tasks_recipe(**changes: Any) -> dict[str, Any]:
    """Raw settings of a recipe of two tasks."""
    data = {"source": "tasks", "tasks": TASKS} | changes.pop("data", {})
    return {"name": "two", "model": {"teacher": "some/encoder"}, "data": data} | changes


def tasks_faults(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        build_config(tasks_recipe(**changes))
    return "\n".join(caught.value.faults)


def test_each_task_has_a_data_set_of_its_own(tmp_path: Path) -> None:
    config = build_config(tasks_recipe())
    assert config.data.tasks is not None
    assert config.data.tasks["sst2"].train == str(Path("a.tsv").absolute())
    flat = config.flatten()
    assert flat["data.tasks.sst2.train"] == str(Path("a.tsv").absolute())
    assert "data.tasks" not in flat and flat["data.tasks.mrpc.subset"] == "mrpc"
    path = tmp_path / "two.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path).data == config.data
    changed = load_config(path, ["data.tasks.mrpc.subset=rte", "data.mixing=temperature"])
    assert changed.data.tasks is not None and changed.data.tasks["mrpc"].subset == "rte"


def test_faults_of_tasks_name_their_keys() -> None:
    bad = {
        "sst2": TASKS["sst2"] | {"trian": "x"},
        "mrpc": {"source": "files", "train": "a"},
        "mean": {"source": "tasks"},
    }
    found = tasks_faults(data={"tasks": bad}, moe={"top_k": 9})
    assert "data.tasks.sst2.trian is an unknown key" in found and "Did you mean train?" in found
    assert "data.tasks.mean.source=tasks is not a choice" in found
    assert "moe.top_k=9" in found
    # What the keys say together is checked once each of them is sound.
    found = tasks_faults(data={"tasks": bad | {"sst2": TASKS["sst2"], "mean": TASKS["mrpc"]}})
    assert "data.tasks.mrpc.dev and data.tasks.mrpc.dev_size are both missing" in found
    assert "data.tasks.mean cannot be a task's name" in found


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"data": {"tasks": {"sst2": TASKS["sst2"]}}}, "needs two tasks or more"),
        ({"data": {"train": "x.tsv"}}, "data.train is not read with data.source=tasks"),
        ({"data": {"mixing_temperature": 3}}, "data.mixing_temperature=3 is read with"),
        ({"data": {"source": "hub", "name": "glue"}}, "data.tasks belongs to data.source=tasks"),
        ({"distill": {"adversarial_weight": 1}}, "discriminator reads logits of one size"),
        (
            {"moe": {"router": "task_gate"}, "distill": {"load_balancing_weight": 1}},
            "a batch is of one task",
        ),
        ({"moe": {"partition": "coactivation"}}, "moe.partition=coactivation looks at"),
        ({"search": {"space": {"moe.top_k": [1, 2]}}}, "search.space works on one task"),
    ],
)
def test_what_does_not_go_with_several_tasks_is_said(changes: dict[str, Any], fault: str) -> None:
    assert fault in tasks_faults(**changes)


def test_a_search_on_several_tasks_is_one_fault() -> None:
    found = tasks_faults(search={"space": {"moe.num_experts": {"choice": [3, 7]}}})
    assert found.count("\n") == 0 and "a recipe whose `data` section is that of one" in found
