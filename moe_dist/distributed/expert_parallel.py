"""Spread the experts of a model's MoE layers over ranks, in a form that DeepSpeed's engine knows.

Importing this file imports DeepSpeed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from moe_dist.distributed.all_to_all import AllToAllDispatcher
from moe_dist.distributed.expert_placement import Order, places
from moe_dist.distributed.mailboxes import Mailboxes
from moe_dist.distributed.merged_experts import decide_over_group, merge_over_group
from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.errors import ConfigError
from moe_dist.moe import Experts, MergedLayer, Merges, MoELayer, TaskMergeGate, current_context


class ExpertSlice(nn.Module, ABC):
    """What layers have in common whose experts are this rank's slice of all experts.

    DeepSpeed's engine recognises expert layers by their class, its `MoE`, and reduces the gradients
    of their experts within its expert groups; nothing else of its layer is used, since it routes by
    hidden state alone and pads to a capacity.

    Args:
        layer: a whole layer; its modules are taken over and its experts are cut to the slice.
        ep_size: ranks that share one set of experts.
        order: which experts are whose; in the order of their numbers if None.
    """

    def __init__(self, layer: MoELayer, ep_size: int, order: Order | None = None) -> None:
        nn.Module.__init__(self)
        # Everything the layer is, hooks included, stays; only its experts and dispatch change.
        self.__dict__.update(layer.__dict__)
        self._modules = dict(layer._modules)
        self.ep_size = ep_size
        self.expert_group_name = f"ep_size_{ep_size}"
        self.num_local_experts = layer.num_experts // ep_size
        self.expert_order = order
        experts = cast(Experts, self.experts)
        _keep_slice(experts, dist.get_rank() % ep_size, ep_size, self.expert_group_name, order)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Create the expert groups; DeepSpeed calls this."""
        assert not use_data_before_expert_parallel_, "expert slices follow consecutive ranks"
        self.join_group(expert_group(self.ep_size))

    @abstractmethod
    def join_group(self, group: dist.ProcessGroup) -> None:
        """Compute with the other ranks' experts from now on."""


class ExpertParallelMoE(ExpertSlice, MoELayer, MoE):
    """An `MoELayer` that sends tokens to the ranks of their experts."""

    def join_group(self, group: dist.ProcessGroup) -> None:
        """Dispatch through the group from now on."""
        order = self.expert_order
        self.dispatcher = AllToAllDispatcher(group, None if order is None else places(order))


class ExpertParallelMergedLayer(ExpertSlice, MergedLayer, MoE):
    """A `MergedLayer` for which each rank adds its experts' part of every task's merge."""

    def join_group(self, group: dist.ProcessGroup) -> None:
        """Merge over the group from now on."""
        self.group = group

    def decide(self, hidden_TD: Tensor) -> Merges:
        """Ask the gate about the tasks of all ranks."""
        gate = cast(TaskMergeGate, self.gate)
        return decide_over_group(gate, hidden_TD, current_context(), self.group)

    def merge(self, rows_TD: Tensor, merges: Merges) -> Tensor:
        """Apply to each token the merge of its task, of all ranks' experts."""
        return merge_over_group(self.experts, rows_TD, merges, self.group)


SPREAD: dict[type[MoELayer], type[ExpertSlice]] = {
    MoELayer: ExpertParallelMoE,
    MergedLayer: ExpertParallelMergedLayer,
}
"""How a class of layers is spread over ranks; one that is not here cannot be."""


def expert_group(ep_size: int) -> dist.ProcessGroup:
    """Return this rank's group of `ep_size` consecutive ranks, which hold all experts.

    Every rank must call this for a new `ep_size`: it creates the groups the first time.
    """
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)
    return cast(dist.ProcessGroup, groups._get_expert_parallel_group(name))


def expert_data_group(ep_size: int) -> dist.ProcessGroup:
    """Return the group of ranks that hold this rank's experts, after `expert_group`."""
    name = f"ep_size_{ep_size}"
    return cast(dist.ProcessGroup, groups._get_expert_data_parallel_group(name))


def parallelize_experts(
    model: nn.Module, ep_size: int, orders: Mapping[str, Order] | None = None
) -> None:
    """Cut every MoE layer's experts to slice `rank % ep_size`, in place.

    Parameter names stay as they are. With ep_size 1 nothing changes: every rank keeps all experts
    and they are trained like any other parameter. Layers with one expert stay whole.

    Args:
        model: a whole model, alike on every rank.
        ep_size: ranks that share one set of experts.
        orders: by dotted name of a layer that sends tokens, the order that slices are cut from;
            others are cut in the order of their numbers.

    Raises:
        ConfigError: if ep_size does not divide the ranks or the experts of a layer.
    """
    check_ep_size(model, ep_size, dist.get_world_size())
    if ep_size == 1:
        return
    for name, layer in list(moe_layers(model)):
        if layer.num_experts == 1 or isinstance(layer, ExpertSlice):
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        order = None if orders is None or layer.merges else orders.get(name)
        setattr(parent, attribute, SPREAD[type(layer)](layer, ep_size, order))


def share_mailboxes(model: nn.Module) -> None:
    """Let tokens go through shared memory where ranks are on one machine's CPU; collective."""
    of_group: dict[dist.ProcessGroup, Mailboxes | None] = {}
    for _, layer in moe_layers(model):
        dispatcher = layer.dispatcher
        if isinstance(layer, ExpertParallelMoE) and isinstance(dispatcher, AllToAllDispatcher):
            if dispatcher.group not in of_group:
                of_group[dispatcher.group] = Mailboxes.over(dispatcher.group)
            dispatcher.mailboxes = of_group[dispatcher.group]


def check_ep_size(model: nn.Module, ep_size: int, world_size: int) -> None:
    """Check that the experts can be spread; a ConfigError lists every fault."""
    faults = []
    if ep_size < 1 or world_size % ep_size:
        faults.append(
            f"parallel.ep_size={ep_size} does not divide {world_size} workers; "
            f"use one of {_divisors(world_size)}."
        )
    for name, layer in moe_layers(model):
        if ep_size == 1 or layer.num_experts == 1 or isinstance(layer, ExpertSlice):
            continue
        fault = _why_whole(layer)
        if fault:
            faults.append(f"{name}: {fault}; set parallel.ep_size to 1.")
        if layer.num_experts % ep_size:
            faults.append(
                f"{name}: {layer.num_experts} experts are not divisible by "
                f"parallel.ep_size={ep_size}; use ep_size {_divisors(layer.num_experts)}."
            )
    if faults:
        raise ConfigError(faults, source="parallel")


def _why_whole(layer: MoELayer) -> str:
    """Say why a layer's experts cannot be spread over ranks, if so."""
    if type(layer) not in SPREAD:
        return f"how the experts of {type(layer).__name__} are spread over ranks is not known"
    if isinstance(layer, MergedLayer) and not isinstance(layer.gate, TaskMergeGate):
        return "its experts are merged anew for each sequence, so ranks would send all weights"
    return ""


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def _keep_slice(
    experts: Experts, slice_index: int, num_slices: int, group_name: str, order: Order | None
) -> None:
    num_local = experts.num_experts // num_slices
    start = slice_index * num_local
    for name, parameter in list(experts.named_parameters(recurse=False)):
        own = parameter.detach()
        if order is None:
            own = own[start : start + num_local].clone()
        else:
            ids = torch.tensor(order[start : start + num_local], device=own.device)
            own = own.index_select(0, ids)
        local = nn.Parameter(own, requires_grad=parameter.requires_grad)
        local.expert_order = order  # type: ignore[attr-defined]
        local.allreduce = False  # type: ignore[attr-defined]
        local.group_name = group_name  # type: ignore[attr-defined]
        setattr(experts, name, local)
    experts.num_experts = num_local
