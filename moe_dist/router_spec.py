"""A router and its options as plain values, from the recipe to the layer; loads no torch.

A new option is a field of `RouterSpec`, a field of the same name in the recipe's `moe` section, and
the code that uses it. A new router is a row of `ROUTER_FACTS`, a name in `RouterName`, and a row
of `moe_dist.moe.routers.ROUTERS` that builds it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from moe_dist.errors import ConversionError

RouterName = Literal[
    "hash_random",
    "hash_balanced",
    "token_gate",
    "sentence_gate",
    "task_gate",
    "merged_task",
    "merged_sequence",
    "merged_token",
]
GateScale = Literal["straight_through", "probability"]
TaskMap = Literal["learned", "fixed"]
DropPolicy = Literal["position", "probability"]
MergeGates = Literal["each", "one"]

DEFAULT_ROUTER: RouterName = "hash_random"
NO_ROUTER = "none"
"""Stands for the router where there is one expert."""


@dataclass(frozen=True)
class RouterFacts:
    """What is true of every router of a name.

    Args:
        chooses_by: what alone decides the experts of a token: its id, its hidden state, its
            sentence's hidden states, or its task.
        has_gate: whether the choice is made by scores that learn.
        reads_token_counts: whether it is built from the counts of the training split.
        merges: whether the chosen experts come together as one before they multiply a token.
    """

    chooses_by: Literal["token_id", "token", "sentence", "task"]
    has_gate: bool = False
    reads_token_counts: bool = False
    merges: bool = False

    @property
    def reads_hidden(self) -> bool:
        """Whether it looks at hidden states."""
        return self.chooses_by in ("token", "sentence")


ROUTER_FACTS: dict[str, RouterFacts] = {
    "hash_random": RouterFacts("token_id"),
    "hash_balanced": RouterFacts("token_id", reads_token_counts=True),
    "token_gate": RouterFacts("token", has_gate=True),
    "sentence_gate": RouterFacts("sentence", has_gate=True),
    "task_gate": RouterFacts("task", has_gate=True),
    "merged_task": RouterFacts("task", has_gate=True, merges=True),
    "merged_sequence": RouterFacts("sentence", has_gate=True, merges=True),
    "merged_token": RouterFacts("sentence", has_gate=True, merges=True),
}


def router_facts(name: str) -> RouterFacts:
    """Look up what is true of a router; ConversionError if there is none of that name."""
    if name not in ROUTER_FACTS:
        raise ConversionError(
            f"there is no router named {name!r}", remedy=f"use one of: {', '.join(ROUTER_FACTS)}"
        )
    return ROUTER_FACTS[name]


@dataclass(frozen=True)
class RouterSpec:
    """A router's name and all of its options.

    Args:
        router: a key of `ROUTER_FACTS`, or `NO_ROUTER`.
        top_k: experts for each token, K; their weights sum to 1.
        gate_scale: weight of the chosen expert for K=1: "straight_through" has the value 1 and a
            gradient, "probability" is the papers' and scales the output.
        gate_noise: standard deviation of noise on a gate's scores, in training.
        gate_jitter: how far the hidden states that a gate reads are scaled up or down at random,
            in training.
        task_map: of a router that chooses by the task: "learned" scores, or "fixed" experts.
        capacity_factor: in training, tokens that an expert takes, as a multiple of its even
            share; None drops nothing.
        drop_policy: who finds a place then: see `moe_dist.moe.capacity.Capacity`.
        merge_gates: of a router that merges: a gate for "each" linear layer of the FFN, or "one"
            for all of them.
        segment_length: of one that merges a decoder's sequences: tokens that share a merge.
    """

    router: str = DEFAULT_ROUTER
    top_k: int = 1
    gate_scale: GateScale = "straight_through"
    gate_noise: float = 0.0
    gate_jitter: float = 0.0
    task_map: TaskMap = "learned"
    capacity_factor: float | None = None
    drop_policy: DropPolicy = "position"
    merge_gates: MergeGates = "each"
    segment_length: int = 128

    @classmethod
    def of(cls, router: str | RouterSpec, **options: Any) -> RouterSpec:
        """Gather a router and its options, which go before those that it has already."""
        if isinstance(router, RouterSpec):
            return replace(router, **options)
        return cls(router=router, **options)

    @property
    def facts(self) -> RouterFacts:
        """What is true of the router."""
        return router_facts(self.router)

    @property
    def has_gate(self) -> bool:
        """Whether scores that learn choose, which a fixed map of the tasks has none of."""
        facts = self.facts
        is_fixed = facts.chooses_by == "task" and not facts.merges and self.task_map == "fixed"
        return facts.has_gate and not is_fixed


FIRST_OPTIONS = ("router", "top_k", "gate_scale")
"""What models of every version say of their router; those of earlier ones may lack the rest."""
