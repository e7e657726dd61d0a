"""Which neurons go where."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import PARTITIONS, PartitionPlan, plan_partition
from moe_dist.conversion.partition_methods import PartitionRequest
from moe_dist.errors import ConversionError, MissingInputError
from tests.conversion.dense_models import random_scores, tiny_model, token_batch

SCORES = [torch.rand(32, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
SIZES: dict[str, Any] = {"num_experts": 4, "expert_size": 8, "num_shared_neurons": 4}


def evidence() -> tuple[Any, list[dict[str, torch.Tensor]]]:
    """A model of two FFNs of 32 neurons, and batches for it."""
    labels = {"labels": torch.tensor([0, 1, 1, 0])}
    return tiny_model("bert"), [token_batch(seed=seed) | labels for seed in (1, 2)]


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


@pytest.mark.parametrize("method", [name for name, row in PARTITIONS.items() if row.distinct])
@pytest.mark.parametrize("num_shared", [0, 3, 8])
def test_neurons_are_distinct(method: str, num_shared: int) -> None:
    model, batches = evidence()
    plan = plan_partition(
        SCORES[:2],
        num_experts=4,
        expert_size=8,
        num_shared_neurons=num_shared,
        method=method,
        model=model,
        batches=batches,
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
        ({"method": "magic"}, "'magic'", "importance, random, inverse, kmeans, coactivation"),
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
    assert list(PARTITIONS) == [
        "importance",
        "random",
        "inverse",
        "kmeans",
        "coactivation",
        "clustered_importance",
        "task_importance",
        "token_clusters",
        "full_copy",
    ]


@pytest.mark.parametrize("method", ["kmeans", "coactivation"])
def test_grouping_keeps_the_neurons_that_importance_keeps(method: str) -> None:
    model, batches = evidence()
    given: dict[str, Any] = {"model": model, "batches": batches}
    grouped = plan_partition(SCORES[:2], **SIZES, method=method, **given)
    dealt = plan_partition(SCORES[:2], **SIZES)
    for one, other in zip(grouped.partitions, dealt.partitions, strict=True):
        assert torch.equal(one.kept_ids, other.kept_ids)
        assert torch.equal(one.shared_ids, other.shared_ids)
        assert not torch.equal(one.expert_ids, other.expert_ids)
    again = plan_partition(SCORES[:2], **SIZES, method=method, **given, layers=[1])
    assert torch.equal(again.partitions[0].expert_ids, grouped.partitions[1].expert_ids)


@pytest.mark.parametrize("method", ["kmeans", "coactivation", "clustered_importance"])
def test_what_a_method_reads_must_be_given(method: str) -> None:
    model, _ = evidence()
    with pytest.raises(MissingInputError, match=f"'{method}' reads the .* of the model"):
        plan_partition(SCORES[:2], **SIZES, method=method)
    if PARTITIONS[method].needs_batches:
        with pytest.raises(MissingInputError, match="of training data, and there is none") as found:
            plan_partition(SCORES[:2], **SIZES, method=method, model=model)
        assert "batches=" in found.value.remedy
        with pytest.raises(MissingInputError, match=r"batches|0 samples"):
            plan_partition(SCORES[:2], **SIZES, method=method, model=model, batches=[])
    one = plan_partition(SCORES[:2], num_experts=1, expert_size=8, num_shared_neurons=0)
    alone = plan_partition(
        SCORES[:2], num_experts=1, expert_size=8, num_shared_neurons=0, method=method
    )
    assert torch.equal(alone.partitions[0].expert_ids, one.partitions[0].expert_ids)


def test_tasks_get_the_neurons_they_need_most() -> None:
    # Tasks count alike: the second one's larger losses do not decide what is shared.
    scores_EF = torch.tensor([[4.0, 3.0, 2.0, 0.5, 0.4, 0.1], [0.0, 10.0, 50.0, 40.0, 0.0, 0.0]])
    plan = plan_partition(
        [scores_EF.sum(0)] * 2,
        num_experts=2,
        expert_size=3,
        num_shared_neurons=1,
        method="task_importance",
        expert_scores=[scores_EF, scores_EF.flip(1)],
    )
    first, second = plan.partitions
    assert first.shared_ids.tolist() == [2]
    assert first.expert_ids.tolist() == [[2, 0, 1], [2, 3, 1]]
    assert second.expert_ids.tolist() == [[3, 5, 4], [3, 2, 4]]
    single = plan_partition(
        [scores_EF.sum(0)],
        num_experts=1,
        expert_size=3,
        num_shared_neurons=0,
        method="task_importance",
    )
    assert single.partitions[0].expert_ids.tolist() == [[2, 3, 1]]


def test_task_importance_says_what_it_lacks() -> None:
    given: dict[str, Any] = SIZES | {"method": "task_importance"}
    with pytest.raises(MissingInputError, match="each expert's data") as found:
        plan_partition(SCORES[:2], **given)
    assert "expert_scores=" in found.value.remedy
    with pytest.raises(ConversionError, match="of the shapes"):
        plan_partition(SCORES[:2], **given, expert_scores=[torch.rand(2, 3)])


def test_clusters_of_data_get_their_own_neurons() -> None:
    """Every other assignment of one FFN's neurons is worth no more (brute force)."""
    generator = torch.Generator().manual_seed(4)
    scores_EF = torch.rand(2, 6, generator=generator)
    request = PartitionRequest(
        layer=0,
        scores_F=scores_EF.sum(0),
        num_experts=2,
        expert_size=3,
        num_shared_neurons=1,
        generator=generator,
        expert_scores_EF=scores_EF,
    )
    part = PARTITIONS["clustered_importance"].split(request)
    share_EF = scores_EF / scores_EF.sum(1, keepdim=True)
    assert part.shared_ids.tolist() == [int(share_EF.sum(0).argmax())]
    rest = [neuron for neuron in range(6) if neuron not in part.shared_ids.tolist()]

    def worth(first: Sequence[int], second: Sequence[int]) -> float:
        return float(share_EF[0, list(first)].sum() + share_EF[1, list(second)].sum())

    best = max(
        worth(first, second)
        for first in itertools.combinations(rest, 2)
        for second in itertools.combinations([n for n in rest if n not in first], 2)
    )
    private = part.expert_ids[:, 1:].tolist()
    assert worth(private[0], private[1]) == pytest.approx(best)
    assert float(share_EF[0, private[0][0]]) >= float(share_EF[0, private[0][1]])
