"""Digests of experts follow their weights and nothing else."""

from __future__ import annotations

import torch

from moe_dist.moe.digests import by_layer, expert_digests, numbered


def stacked(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"w_in": torch.randn(3, 4, 2).to(dtype), "b_in": torch.randn(3, 4).to(dtype)}


def test_a_digest_follows_its_own_weights() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors = stacked(dtype)
        before = expert_digests(tensors)
        assert len(set(before)) == 3
        tensors["b_in"][1, 0] += 1
        after = expert_digests(tensors)
        assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, True]


def test_slices_and_order_of_names_do_not_matter() -> None:
    tensors = stacked()
    whole = expert_digests(tensors)
    assert expert_digests(dict(reversed(tensors.items()))) == whole
    assert expert_digests({name: tensor[1:] for name, tensor in tensors.items()}) == whole[1:]
    columns = {name: tensor.flip(0).flip(0) for name, tensor in tensors.items()}
    assert expert_digests(columns) == whole
    assert expert_digests({}) == []


def test_numbers_come_back_in_order() -> None:
    digests = {"encoder.layer.1": [f"d{i}" for i in range(12)], "b": ["x"]}
    assert numbered(digests)["encoder.layer.1.11"] == "d11"
    assert by_layer(dict(sorted(numbered(digests).items()))) == digests
