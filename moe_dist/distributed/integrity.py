"""No expert is lost, doubled or swapped: digests of what ranks hold against what there should be.

Digests are taken of each rank's experts before they are gathered, of what was gathered, of what a
file holds, and of each rank's experts after a load. They are compared in global order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moe_dist.distributed.engine import TrainEngine
from moe_dist.distributed.expert_placement import Order, order_of, places
from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.errors import CheckpointError
from moe_dist.moe.digests import by_layer, expert_digests

Digests = dict[str, list[str]]
"""Of each expert, by the dotted name of its layer."""


@dataclass(frozen=True)
class HeldExpert:
    """Where an expert lies.

    Args:
        rank: that holds it; None where it is in a file.
        digest: of its weights.
    """

    rank: int | None
    digest: str


def held_digests(module: nn.Module) -> Digests:
    """Hash the experts that a module holds, in the order of each layer's own."""
    return {
        name: expert_digests(dict(layer.experts.named_parameters()))
        for name, layer in moe_layers(module)
    }


def held_orders(module: nn.Module) -> dict[str, Order]:
    """Give the order in which ranks hold experts, of the layers where it is not that of numbers."""
    return {
        name: order
        for name, layer in moe_layers(module)
        for order in map(order_of, layer.experts.parameters())
        if order is not None
    }


def gather_digests(engine: TrainEngine, held: Digests) -> list[Digests]:
    """Bring the ranks' digests to every rank, in the order of the ranks; collective."""
    if engine.world_size == 1:
        return [held]
    found: list[Digests] = [{}] * engine.world_size
    dist.all_gather_object(found, held)
    return found


def stored_digests(tensors: Mapping[str, Tensor], layers: Sequence[str]) -> Digests:
    """Hash the experts among a whole model's tensors, in global order."""
    return {
        layer: expert_digests(
            {name: tensors[name] for name in tensors if name.startswith(_prefix(layer))}
        )
        for layer in layers
    }


def check_file(path: Path, experts: Mapping[str, str]) -> None:
    """Check the experts of a file against the manifest's digests.

    Args:
        path: a safetensors file with whole weights.
        experts: digests by `<layer>.<global expert>`.

    Raises:
        CheckpointError: naming each layer's lost, doubled and swapped experts.
    """
    expected = by_layer(experts)
    prefixes = tuple(_prefix(layer) for layer in expected)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", remedy="use another checkpoint"
        ) from error
    stored = stored_digests(tensors, list(expected))
    faults = [
        fault
        for layer, digests in expected.items()
        for fault in layer_faults(layer, digests, [HeldExpert(None, d) for d in stored[layer]])
    ]
    _refuse(faults, str(path), remedy="use another checkpoint")


def check_gathered(
    stored: Digests, held: Sequence[Digests], orders: Mapping[str, Order] = MappingProxyType({})
) -> None:
    """Check gathered experts against those that their owners had.

    Args:
        stored: of what was gathered, in global order.
        held: of each rank of the expert group that they came from, taken before.
        orders: `held_orders`.

    Raises:
        CheckpointError: naming each layer's lost, doubled and swapped experts.
    """
    faults = []
    for layer, digests in stored.items():
        owned = _numbered(_owned(held, len(digests), layer), orders.get(layer))
        experts_here = [HeldExpert(o.rank, d) for o, d in zip(owned, digests, strict=True)]
        faults += layer_faults(layer, [owner.digest for owner in owned], experts_here)
    _refuse(
        faults,
        "experts changed on their way to rank 0",
        remedy="look for faulty memory or network on these hosts; the checkpoint was not written",
    )


def check_spread(
    held: Sequence[Digests],
    expected: Digests,
    *,
    ep_size: int,
    orders: Mapping[str, Order] = MappingProxyType({}),
) -> None:
    """Check that each expert group holds every expert once, in its place.

    Args:
        held: what each rank holds, in order of the ranks.
        expected: of all experts, in global order.
        ep_size: ranks that share one set of experts; they are consecutive.
        orders: `held_orders`.

    Raises:
        CheckpointError: naming each layer's lost, doubled and swapped experts, and the ranks.
    """
    known = {layer for layer, digests in expected.items() if digests}
    unknown = {layer for of_rank in held for layer, digests in of_rank.items() if digests} - known
    faults = [f"{layer}: the manifest has no digest of its experts" for layer in sorted(unknown)]
    for layer, digests in expected.items():
        size = ep_size if len(digests) > 1 else 1
        for first in range(0, len(held), size):
            experts_here = [
                HeldExpert(rank, digest)
                for rank in range(first, min(first + size, len(held)))
                for digest in held[rank].get(layer, [])
            ]
            faults += layer_faults(layer, digests, _numbered(experts_here, orders.get(layer)))
    _refuse(
        faults,
        "the ranks do not hold the checkpoint's experts",
        remedy="start again; if it comes back, look at the storage and memory of these ranks",
    )


def layer_faults(
    layer: str, expected: Sequence[str], experts_here: Sequence[HeldExpert]
) -> list[str]:
    """Name what is wrong with one layer's experts.

    Experts may be alike (all are before a student with full copies is trained), so that a digest
    is wanted as often as it is expected.

    Args:
        layer: its name.
        expected: digests of all experts, in global order.
        experts_here: what is there, in the order in which it is used.

    Returns:
        One sentence; none if all is well.
    """
    if [expert.digest for expert in experts_here] == list(expected):
        return []
    faults = []
    for digest in dict.fromkeys(expected):
        expert, wanted = expected.index(digest), expected.count(digest)
        holders = [expert for expert in experts_here if expert.digest == digest]
        if len(holders) < wanted:
            faults.append(f"expert {expert} is missing")
        elif len(holders) > wanted:
            faults.append(f"expert {expert} is held {_times(len(holders))}{_ranks(holders)}")
    strangers = [expert for expert in experts_here if expert.digest not in expected]
    if strangers:
        faults.append(f"{len(strangers)} held of unknown weights{_ranks(strangers)}")
    if not faults:
        faults = [
            f"expert {expected.index(expert.digest)} is in the place of expert {position}"
            f"{_ranks([expert])}"
            for position, expert in enumerate(experts_here)
            if expert.digest != expected[position]
        ]
    return [f"{layer}: " + "; ".join(faults)]


def _owned(held: Sequence[Digests], num_experts: int, layer: str) -> list[HeldExpert]:
    """Return one set of a layer's experts, which one rank holds or several share."""
    experts_here = [HeldExpert(rank, d) for rank, of in enumerate(held) for d in of.get(layer, [])]
    return experts_here[:num_experts]


def _numbered(experts_here: list[HeldExpert], order: Order | None) -> list[HeldExpert]:
    """Bring experts from the order in which ranks hold them into that of their numbers."""
    if order is None or len(experts_here) != len(order):
        return experts_here
    return [experts_here[place] for place in places(order)]


def _prefix(layer: str) -> str:
    return f"{layer}.experts." if layer else "experts."


def _times(number: int) -> str:
    return "twice" if number == 2 else f"{number} times"


def _ranks(experts_here: Sequence[HeldExpert]) -> str:
    ranks = sorted({expert.rank for expert in experts_here if expert.rank is not None})
    if not ranks:
        return ""
    *others, last = map(str, ranks)
    return f" (ranks {', '.join(others)} and {last})" if others else f" (rank {last})"


def _refuse(faults: Sequence[str], where: str, *, remedy: str) -> None:
    if faults:
        raise CheckpointError(f"{where}: " + "; ".join(faults), remedy=remedy)
