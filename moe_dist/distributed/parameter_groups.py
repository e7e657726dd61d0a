"""Which parameters are trained with which learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_dist.moe import MoELayer


def routed_expert_names(module: nn.Module) -> set[str]:
    """Return the dotted names of the parameters that belong to routed experts.

    The tied shared part of a layer sees every token and is not among them.
    """
    names: set[str] = set()
    for layer_name, layer in moe_layers(module):
        if layer.num_experts > 1:
            prefix = f"{layer_name}.experts." if layer_name else "experts."
            names.update(prefix + name for name, _ in layer.experts.named_parameters())
    return names


def moe_layers(module: nn.Module) -> Iterator[tuple[str, MoELayer]]:
    """Yield each MoE layer with its dotted name, in the order of the model."""
    for name, child in module.named_modules():
        if isinstance(child, MoELayer):
            yield name, child


def is_expert_slice(tensor: Tensor) -> bool:
    """Tell whether `parallelize_experts` sliced a tensor; DeepSpeed reads the same mark."""
    return getattr(tensor, "allreduce", True) is False


def parameter_groups(
    module: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    expert_learning_rate_scale: float,
) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups for AdamW.

    Biases and normalisation weights are not decayed; routed experts may learn faster, since each
    sees only a part of the tokens.

    Args:
        module: the model.
        learning_rate: the rate of everything but routed experts.
        weight_decay: decoupled weight decay.
        expert_learning_rate_scale: factor on the rate of routed experts.

    Returns:
        Groups as torch optimizers take them; `base_lr` is the rate before the schedule, and
        `name` and `moe` are what DeepSpeed's ZeRO reads.
    """
    expert_names = routed_expert_names(module)
    members: dict[tuple[bool, bool, str], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        group_name = str(getattr(parameter, "group_name", "")) if is_expert_slice(parameter) else ""
        key = (name in expert_names, _is_decayed(name, parameter), group_name)
        members.setdefault(key, []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (is_expert, decayed, group_name), parameters in members.items():
        rate = learning_rate * (expert_learning_rate_scale if is_expert else 1.0)
        groups.append(
            {
                "params": parameters,
                "lr": rate,
                "base_lr": rate,
                "weight_decay": weight_decay if decayed else 0.0,
                "name": group_name or ("experts" if is_expert else "dense"),
                "moe": bool(group_name),
            }
        )
    return groups


def build_adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> Any:
    """Return AdamW over `parameter_groups`, fused where every parameter allows it."""
    fused = all(
        parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
        for group in groups
        for parameter in group["params"]
    )
    return torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=eps, fused=fused)


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    # Stacked expert biases are (E, F) or (E, D), so the rank alone does not tell.
    leaf = name.rpartition(".")[2]
    return parameter.ndim >= 2 and leaf not in ("b_in", "b_gate", "b_out", "bias")
