"""Neurons that all experts hold: stored once, and nothing that a model computes changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dist.errors import ConversionError
from moe_dist.inference import load_model, save_model
from moe_dist.inference.compact import compact_experts
from moe_dist.inference.fusion import fuse_neurons
from moe_dist.measure.profile import count_parameters
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import logits_of, token_batch
from tests.inference.moe_students import even, student
from tests.moe.merged import draw_gates


@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
def test_neurons_that_are_alike_are_stored_once_without_a_change(
    router: str, tmp_path: Path
) -> None:
    model = student(router=router)
    batch = token_batch()
    with torch.no_grad():  # not in the same place in every expert
        for layer in moe_layers(model):
            order = torch.randperm(14)
            for name, axis in (("w_in", 0), ("b_in", 0), ("w_out", 1)):
                tensor = getattr(layer.experts, name)
                tensor[2] = tensor[2].index_select(axis, order)
    fused, count = fuse_neurons(model)
    assert count == 8
    torch.testing.assert_close(logits_of(fused, batch), logits_of(model, batch))
    neuron = 2 * 16 + 1
    saved = count_parameters(model).total - count_parameters(fused).total
    assert saved == 2 * 3 * 8 * neuron
    again = load_model(save_model(fused, tmp_path / "fused"))
    torch.testing.assert_close(logits_of(again, batch), logits_of(fused, batch))
    smaller, _ = compact_experts(fused, 2, use=even(fused))
    assert all(layer.shared is not None for layer in moe_layers(smaller))


def test_fusion_leaves_alone_what_it_may_not_touch() -> None:
    for options in ({"tie_shared": True}, {"num_shared": 0, "expert_size": 8}):
        model = student(**options)
        assert fuse_neurons(model) == (model, 0)
    scaled = student(router="token_gate", gate_scale="probability")
    assert fuse_neurons(scaled) == (scaled, 0)
    for router in ({"router": "hash_random"}, {"router": "task_gate", "task_map": "fixed"}):
        gateless = student(gate_scale="probability", num_tasks=1, **router)
        assert fuse_neurons(gateless)[1] == 8, "there is no probability to scale by"


def test_merged_experts_share_what_they_hold_in_the_same_place() -> None:
    model = student(router="merged_sequence", top_k=2)
    draw_gates(model)
    batch = token_batch()
    fused, count = fuse_neurons(model)
    assert count == 8
    torch.testing.assert_close(logits_of(fused, batch), logits_of(model, batch))
    with torch.no_grad():
        for layer in moe_layers(model):
            for name, axis in (("w_in", 0), ("b_in", 0), ("w_out", 1)):
                tensor = getattr(layer.experts, name)
                tensor[2] = tensor[2].roll(1, axis)
    assert fuse_neurons(model) == (model, 0), "in other places they are merged with others"


def test_merged_experts_are_not_joined() -> None:
    model = student(router="merged_task", top_k=2)
    with pytest.raises(ConversionError, match="cost as much as one whatever their number"):
        compact_experts(model, 2, use=even(model))
