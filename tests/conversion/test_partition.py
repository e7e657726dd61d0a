"""Which neurons go where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import PARTITIONS, PartitionPlan, plan_partition
from moe_dist.errors import ConversionError
from tests.conversion.dense_models import random_scores, tiny_model

SCORES = [torch.rand(32, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
SIZES: dict[str, Any] = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 4}


def test_importance_is_dealt_as_the_paper_says() -> None:
    plan = plan_partition(SCORES, **SIZES)
    assert plan.layers == (0, 1, 2)
    for part, score_F in zip(plan.partitions, SCORES, strict=True):
        order = score_F.argsort(descending=True)
        assert part.shared_ids.tolist() == order[:4].tolist()
        for expert in range(4):
            private = [int(order[4 + expert + 4 * turn]) for turn in range(4)]
            assert part.expert_ids[expert].tolist() == order[:4].tolist() + private


def test_the_papers_own_sizes() -> None:
    scores = [torch.arange(3072, 0, -1).float()]
    plan = plan_partition(scores, num_experts=4, expert_size=768, num_shared_neurons=512)
    kept = plan.partitions[0].kept_ids
    assert kept.tolist() == list(range(1536)), "the lowest 1536 go"


@pytest.mark.parametrize("method", ["importance", "random", "inverse"])
@pytest.mark.parametrize("num_shared", [0, 3, 8])
def test_neurons_are_distinct(method: str, num_shared: int) -> None:
    plan = plan_partition(
        SCORES, num_experts=4, expert_size=8, num_shared_neurons=num_shared, method=method
    )
    for part in plan.partitions:
        assert part.expert_ids.shape == (4, 8)
        assert part.shared_ids.shape == (num_shared,)
        for expert in range(4):
            assert part.expert_ids[expert, :num_shared].tolist() == part.shared_ids.tolist()
            assert len(set(part.expert_ids[expert].tolist())) == 8
        private = part.expert_ids[:, num_shared:].flatten().tolist()
        assert len(set(private)) == len(private)
        assert not set(private) & set(part.shared_ids.tolist())
        assert part.kept_ids.numel() == num_shared + 4 * (8 - num_shared)


def test_inverse_keeps_what_importance_drops() -> None:
    kept = plan_partition(SCORES, **SIZES, method="importance").partitions[0].kept_ids
    dropped = plan_partition(SCORES, **SIZES, method="inverse").partitions[0].kept_ids
    score_F = SCORES[0]
    assert float(score_F[kept].sum()) > float(score_F[dropped].sum())
    lowest = score_F.argsort()[: dropped.numel()]
    assert sorted(lowest.tolist()) == dropped.tolist()


def test_random_follows_its_seed_and_no_other_layer() -> None:
    first = plan_partition(SCORES, **SIZES, method="random", seed=3)
    again = plan_partition(SCORES, **SIZES, method="random", seed=3)
    other = plan_partition(SCORES, **SIZES, method="random", seed=4)
    assert first.to_dict() == again.to_dict()
    assert first.to_dict() != other.to_dict()
    assert not torch.equal(first.partitions[0].expert_ids, first.partitions[1].expert_ids)
    alone = plan_partition(SCORES, **SIZES, method="random", seed=3, layers=[2])
    assert torch.equal(alone.partitions[0].expert_ids, first.partitions[2].expert_ids)


def test_full_copy() -> None:
    plan = plan_partition(
        SCORES, num_experts=3, expert_size=32, num_shared_neurons=0, method="full_copy"
    )
    for expert in range(3):
        assert sorted(plan.partitions[0].expert_ids[expert].tolist()) == list(range(32))
    with pytest.raises(ConversionError, match="expert_size is 8") as caught:
        plan_partition(SCORES, **SIZES, method="full_copy")
    assert "set expert_size to 32" in caught.value.remedy


def test_one_expert_is_the_pruned_dense_student() -> None:
    plan = plan_partition(
        SCORES, num_experts=1, expert_size=8, num_shared_neurons=4, tie_shared=True
    )
    assert (plan.num_shared_neurons, plan.tie_shared) == (0, False)
    for part, score_F in zip(plan.partitions, SCORES, strict=True):
        assert part.expert_ids[0].tolist() == score_F.argsort(descending=True)[:8].tolist()


def test_layers_are_a_subset_in_order() -> None:
    plan = plan_partition(SCORES, **SIZES, layers=[2, 0])
    assert plan.layers == (0, 2)
    assert plan.num_layers == 3


def test_equal_scores_are_split_alike_everywhere() -> None:
    plan = plan_partition([torch.zeros(32)], **SIZES)
    assert plan.partitions[0].shared_ids.tolist() == [0, 1, 2, 3]


def test_plans_survive_json(tmp_path: Path) -> None:
    plan = plan_partition(SCORES, **SIZES, method="random", tie_shared=True, seed=5, layers=[1])
    plan.save(tmp_path / "plan.json")
    loaded = PartitionPlan.load(tmp_path / "plan.json")
    assert loaded.to_dict() == plan.to_dict()
    assert torch.equal(loaded.partitions[0].expert_ids, plan.partitions[0].expert_ids)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"partitions": 3}'])
def test_files_that_hold_no_plan(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConversionError, match="partition plan"):
        PartitionPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({"expert_size": 33}, "expert_size=33 is larger than FFN 0", "32 or less"),
        ({"num_shared_neurons": 9}, "num_shared_neurons=9 is larger", "share fewer"),
        ({"num_experts": 16}, "need 68 different neurons", "5 or less"),
        ({"num_experts": 0}, "nothing to compute", "at least one"),
        ({"expert_size": 0, "num_shared_neurons": 0}, "nothing to compute", "at least one"),
        ({"num_shared_neurons": -1}, "nothing to compute", "no negative"),
        ({"layers": [3]}, r"does not have: \[3\]", "0 to 2"),
        ({"layers": [-1]}, r"does not have: \[-1\]", "0 to 2"),
        ({"layers": []}, "layers is empty", "leave layers out"),
        ({"method": "kmeans"}, "'kmeans'", "importance, random, inverse, full_copy"),
    ],
)
def test_sizes_that_cannot_be_met(changes: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        plan_partition(SCORES, **(SIZES | changes))
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([torch.rand(4, 8)], r"FFN 0 .* not \(4, 8\)"),
        ([torch.rand(32), torch.tensor(1.0)], r"FFN 1 .* not \(\)"),
        ([torch.full((32,), float("nan"))], "not all finite"),
        ([], "no scores"),
    ],
)
def test_scores_of_a_wrong_shape(scores: list[torch.Tensor], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        plan_partition(scores, **SIZES)


def test_scores_are_checked_against_the_model() -> None:
    model = tiny_model("bert")
    assert plan_partition(random_scores(model), **SIZES, model=model).num_layers == 2
    with pytest.raises(ConversionError, match="neurons, but the model has"):
        plan_partition(SCORES, **SIZES, model=model)


def test_the_table_holds_what_the_design_names_so_far() -> None:
    assert list(PARTITIONS) == ["importance", "random", "inverse", "full_copy"]
