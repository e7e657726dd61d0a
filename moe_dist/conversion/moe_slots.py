"""MoE layers in the places of a model's FFNs, as its configuration's `moe` entry says.

Shapes: D model, E experts, V vocabulary, K active experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from torch import Tensor, nn

from moe_dist.conversion.families import FamilySpec, FFNSlot, find_slots, find_stacks
from moe_dist.errors import ConversionError
from moe_dist.moe.capacity import Capacity
from moe_dist.moe.experts import Experts
from moe_dist.moe.hash_tables import random_table
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.merge_gates import MergeGate
from moe_dist.moe.merged_layer import MergedLayer
from moe_dist.moe.routers import build_router
from moe_dist.moe.routing import install_routing_hooks
from moe_dist.router_spec import FIRST_OPTIONS, RouterSpec


@dataclass(frozen=True)
class MoeSettings:
    """All that is needed to rebuild a converted model's layers, kept in config.json.

    Args:
        num_experts: E; with 1 there is no router.
        expert_size: neurons that one expert computes for a token, shared ones included.
        num_shared_neurons: how many of them all experts hold.
        tie_shared: the shared neurons are one set of weights beside the routed experts.
        layers: indices of the converted FFNs.
        router: its name and options; kept as entries beside the others.
        seed: of hash tables and gates; each layer derives its own.
        num_tasks: tasks that a task router tells apart.
        partition: the method that chose the neurons.
        vocab_size: rows of the hash tables; the configuration's where None, as models of earlier
            versions have it.
        absent: see `moe_dist.conversion.absent`.
    """

    num_experts: int
    expert_size: int
    num_shared_neurons: int
    tie_shared: bool
    layers: tuple[int, ...]
    router: RouterSpec
    seed: int
    num_tasks: int | None
    partition: str
    vocab_size: int | None = None
    absent: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as values that JSON can hold."""
        values = asdict(self) | {"layers": list(self.layers)} | asdict(self.router)
        # Nearly no model lacks a part; entries of earlier versions do not name it.
        del values["absent"]
        return values | ({"absent": list(self.absent)} if self.absent else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeSettings:
        """Read the `moe` entry of a configuration; a setting it lacks is a ConversionError.

        Entries that are no settings are left alone.
        """
        required = [one.name for one in fields(cls) if one.default is MISSING]
        missing = [name for name in (*required, *FIRST_OPTIONS) if name not in values]
        if missing:
            raise ConversionError(
                f"the model's configuration lacks moe.{', moe.'.join(missing)}",
                remedy="convert the model again with dense_to_moe",
            )
        own, options = (
            {one.name: values[one.name] for one in fields(kind) if one.name in values}
            for kind in (cls, RouterSpec)
        )
        lists = {"layers": tuple(values["layers"]), "absent": tuple(values.get("absent", ()))}
        return cls(**(own | lists | {"router": RouterSpec(**options)}))


def replace_ffns(
    model: nn.Module,
    spec: FamilySpec,
    settings: MoeSettings,
    *,
    token_counts: Tensor | None = None,
) -> None:
    """Put fresh MoE layers where the FFNs of a dense model are, in place, and install the hooks.

    `token_counts`, (V,), serve hash_balanced; without them its table is a placeholder that a
    checkpoint's own replaces.
    """
    slots = find_slots(model, spec)
    vocab_size = settings.vocab_size
    if vocab_size is None:
        vocab_size = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
    for index in settings.layers:
        slots[index].replace(_build_layer(slots[index], settings, vocab_size, token_counts))
    for stack, causal in find_stacks(model, spec):
        install_routing_hooks(stack, causal=causal)


def router_for(
    settings: MoeSettings,
    *,
    d_model: int,
    vocab_size: int,
    token_counts: Tensor | None = None,
    layer: int = 0,
    is_filled_later: bool = False,
    gated: bool = False,
) -> nn.Module:
    """Build the router of one layer; the FFN's index decides its seed.

    `token_counts`, (V,), serve hash_balanced. With `is_filled_later` a checkpoint brings the
    tables, so that any will do. Errors are those of `build_router`.
    """
    spec, seed = settings.router, settings.seed * 1_000_003 + layer
    table = None
    if is_filled_later and spec.facts.reads_token_counts and token_counts is None:
        table = random_table(vocab_size, settings.num_experts, seed=seed, top_k=spec.top_k)
    return build_router(
        spec,
        d_model=d_model,
        num_experts=settings.num_experts,
        vocab_size=vocab_size,
        seed=seed,
        token_counts=token_counts,
        num_tasks=settings.num_tasks,
        table=table,
        gated=gated,
    )


def _build_layer(
    slot: FFNSlot, settings: MoeSettings, vocab_size: int, token_counts: Tensor | None
) -> MoELayer:
    weights = slot.weights()
    d_model = weights.w_in.shape[1]
    num_shared = settings.num_shared_neurons if settings.tie_shared else 0

    def experts(num_experts: int, size: int, bias_out: bool) -> Experts:
        return Experts(
            num_experts,
            d_model,
            size,
            activation=slot.activation,
            gated=slot.gated,
            bias_in=weights.b_in is not None,
            bias_out=bias_out,
            dropout=slot.dropout,
        )

    router = None
    if settings.num_experts > 1:
        router = router_for(
            settings,
            d_model=d_model,
            vocab_size=vocab_size,
            token_counts=token_counts,
            layer=slot.index,
            is_filled_later=True,
            gated=slot.gated,
        )
    capacity = None if router is None else Capacity.of(settings.router)
    kind = MergedLayer if isinstance(router, MergeGate) else MoELayer
    return kind(
        experts(settings.num_experts, settings.expert_size - num_shared, weights.b_out is not None),
        router,
        shared=experts(1, num_shared, False) if num_shared else None,
        name=slot.name,
        capacity=capacity,
    )
