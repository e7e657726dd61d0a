"""The recipe's `moe` section: experts, their neurons and their router."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field

from moe_dist.config.sections import Integer, Number, Section, Switch
from moe_dist.router_spec import (
    DEFAULT_ROUTER,
    DropPolicy,
    GateScale,
    MergeGates,
    RouterName,
    RouterSpec,
    TaskMap,
)

# The table PARTITIONS says what exists; loading it here would cost torch, so a test keeps this in
# step.
PartitionName = Literal[
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


MAX_EXPERTS = 2**16
MAX_NEURONS = 2**24
MAX_SEGMENT = 2**24


class MoeConfig(Section):
    """How the teacher's feed-forward neurons become experts."""

    num_experts: Integer = Field(
        default=4,
        ge=1,
        le=MAX_EXPERTS,
        description="Experts in each converted layer; 1 is the plain pruned dense student.",
    )
    expert_size: Integer = Field(
        default=768,
        ge=1,
        le=MAX_NEURONS,
        description="Neurons that one token uses in one expert, the shared ones included.",
    )
    num_shared_neurons: Integer = Field(
        default=512,
        ge=0,
        le=MAX_NEURONS,
        description="The most important neurons, which every expert gets, counted in "
        "`moe.expert_size`.",
    )
    tie_shared: Switch = Field(
        default=False,
        description="Keep the shared neurons one set of weights, computed once for every token "
        "beside the routed private part. When false they merely start alike.",
    )
    partition: PartitionName = Field(
        default="importance",
        description="How neurons are handed out: in turn by `importance`, at `random`, or the "
        "least important first (`inverse`); the most important ones grouped by their input weights "
        "(`kmeans`) or by firing together on training rows (`coactivation`); by their importance "
        "for one cluster of training rows each (`clustered_importance`); by their importance for "
        "the tasks that `task_gate` sends to an expert, one neuron perhaps to several experts "
        "(`task_importance`); by their importance for one kind of token each, which `token_gate` "
        "starts out telling apart (`token_clusters`); or all of them to every expert "
        "(`full_copy`).",
    )
    layers: Annotated[tuple[Integer, ...], Field(min_length=1)] | None = Field(
        default=None, description="Numbers of the layers to convert, from 0; all when not given."
    )
    router: RouterName = Field(
        default=DEFAULT_ROUTER,
        description="How tokens find experts: `hash_random` fixes a random expert for each token "
        "id, `hash_balanced` spreads the ids by their counts in the training rows, `token_gate` "
        "learns the choice for each token, `sentence_gate` for each sentence, `task_gate` for each "
        "task, all of whose tokens go to the same experts (`data.source: tasks`). With the others "
        "experts are merged into one before they are used: `merged_task` learns for each task how, "
        "`merged_sequence` for each sequence (in a decoder for each segment of it), and "
        "`merged_token` likewise, with a small network for each token beside it.",
    )
    combine: Literal["auto", "dispatch", "merge"] = Field(
        default="auto",
        description="How experts come together: tokens travel to them (`dispatch`), or they become "
        "one (`merge`). `auto` is what the router does; to say another thing is an error.",
    )
    top_k: Integer = Field(
        default=RouterSpec.top_k,
        ge=1,
        le=MAX_EXPERTS,
        description="Experts that each token uses, or that become one.",
    )
    gate_scale: GateScale = Field(
        default=RouterSpec.gate_scale,
        description="Weight of a single chosen expert: `straight_through` is 1 and still trains "
        "the gate, `probability` is the gate's own value, which changes the function at the start.",
    )
    gate_noise: Number = Field(
        json_schema_extra={"in_flight": "noise of the next steps"},
        default=RouterSpec.gate_noise,
        ge=0,
        description="Standard deviation of noise on a gate's scores, in training only; each sample "
        "draws its own, whatever workers and micro-batches there are.",
    )
    gate_jitter: Number = Field(
        json_schema_extra={"in_flight": "noise of the next steps"},
        default=RouterSpec.gate_jitter,
        ge=0,
        lt=1,
        description="In training a gate's input is multiplied by random numbers from 1 - jitter to "
        "1 + jitter; for `token_gate` and `sentence_gate`.",
    )
    task_map: TaskMap = Field(
        default=RouterSpec.task_map,
        description="Of `task_gate`: the experts of a task are `learned`, or `fixed` in turn.",
    )
    capacity_factor: Number | None = Field(
        json_schema_extra={"in_flight": "limit of the next steps"},
        default=RouterSpec.capacity_factor,
        gt=0,
        description="In training an expert takes at most so many times its even share of the "
        "tokens of one worker's micro-batch, and `moe/dropped` counts those turned away, which "
        "skip the routed part of the layer. No limit when not given; never one without training.",
    )
    drop_policy: DropPolicy = Field(
        default=RouterSpec.drop_policy,
        description="Who finds a place under `moe.capacity_factor`: the first tokens (`position`) "
        "or those that the gate is surest of (`probability`).",
    )
    merge_gates: MergeGates = Field(
        default=RouterSpec.merge_gates,
        description="Of merged experts: a gate for `each` linear layer of the feed-forward "
        "network, as published, or `one` for all of them.",
    )
    segment_length: Integer = Field(
        default=RouterSpec.segment_length,
        ge=1,
        le=MAX_SEGMENT,
        description="Of experts that are merged by sequence in a decoder: tokens that share a "
        "merge, whose gate reads the segments before.",
    )
    fit_output: Literal["auto", True, False] = Field(
        default="auto",
        description="Fit the output weights of each expert to what the dense layer gave, by least "
        "squares over the training rows' tokens that its router sends there, before any training. "
        "`auto` does so where `moe.top_k` is 1 and experts are not merged, also for the pruned "
        "dense student; in a comparison only if the main student is fitted too.",
    )
    importance_samples: Integer | None = Field(
        default=4096,
        ge=1,
        description="Training rows that neurons are scored on, drawn by the seed; null for all. "
        "The partitions `coactivation`, `clustered_importance`, `task_importance` and "
        "`token_clusters`, and `moe.fit_output`, look at the same rows.",
    )

    @property
    def router_spec(self) -> RouterSpec:
        """The router and its options, which have the same names here and there."""
        return RouterSpec(**{one.name: getattr(self, one.name) for one in fields(RouterSpec)})

    @property
    def merges(self) -> bool:
        """Whether there are several experts, and they are merged into one."""
        return self.num_experts > 1 and self.router_spec.facts.merges

    @property
    def fits_output(self) -> bool:
        """Whether the output weights of experts, or of the pruned student, are fitted."""
        if self.fit_output == "auto":
            return self.top_k == 1 and not self.merges
        return self.fit_output

    @property
    def active_neurons(self) -> int:
        """Feed-forward neurons that one token uses in a converted layer."""
        if self.merges:
            return self.expert_size
        if self.tie_shared:
            private = self.expert_size - self.num_shared_neurons
            return self.num_shared_neurons + self.top_k * private
        return self.top_k * self.expert_size
