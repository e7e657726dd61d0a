"""Rules for recipes whose experts are merged into one, and what merging means for their start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from moe_dist.config.data_checks import Rule
from moe_dist.config.faults import either
from moe_dist.config.moe_section import MoeConfig
from moe_dist.config.run_config import RunConfig
from moe_dist.router_spec import ROUTER_FACTS, RouterSpec

MERGED = tuple(name for name, facts in ROUTER_FACTS.items() if facts.merges)


def merge_notes(config: RunConfig) -> list[str]:
    """Say what merging does to the students, and which of its keys nobody reads: one line each.

    What is so of the recipe's own student is not said again of its comparisons.
    """
    students = {"": config} | {label: config.resolve_comparison(label) for label in config.compare}
    said: dict[str, list[str]] = {}
    for label, own in students.items():
        for line in _notes(own):
            said.setdefault(line, []).append(label)
    lines = [
        line if labels[0] == "" else f"{', '.join(f'compare.{label}' for label in labels)}: {line}"
        for line, labels in said.items()
    ]
    return [*lines, *_unread_keys(students)]


def segment_faults(config: RunConfig, decodes: bool) -> list[str]:
    """Refuse a length of segments where the model reads whole sequences at once."""
    length = config.moe.segment_length
    if decodes or not _merges_sequences(config.moe) or length == RouterSpec.segment_length:
        return []
    return [
        f"moe.segment_length={length} divides what a decoder reads, and the model is an encoder, "
        "whose experts merge once for each sequence; leave it out."
    ]


def _unread_keys(students: Mapping[str, RunConfig]) -> Iterator[str]:
    main = students[""]
    tries_others = {"moe.router", "moe.num_experts"} & set(main.search.space)
    for key, reads in _READERS.items():
        default = MoeConfig.model_fields[key].default
        readers = {getattr(own.moe, key) for own in students.values() if reads(own.moe)}
        for label, own in students.items():
            value = getattr(own.moe, key)
            is_inherited = bool(label) and value == getattr(main.moe, key)
            if value == default or reads(own.moe) or is_inherited:
                continue
            if not label and (value in readers or tries_others):
                continue
            yield (
                f"{f'compare.{label}: ' if label else ''}moe.{key}={value} changes nothing: "
                f"{_why_unread(own.moe)}; leave it out"
            )


def _why_unread(moe: MoeConfig) -> str:
    if moe.num_experts == 1:
        return "moe.num_experts=1 leaves nothing to be merged"
    if moe.merges:
        return f"moe.router={moe.router} merges for each task, whatever the sequence"
    return f"moe.router={moe.router} merges no experts"


def _merges_sequences(moe: MoeConfig) -> bool:
    return moe.merges and moe.router_spec.facts.chooses_by != "task"


_READERS: dict[str, Callable[[MoeConfig], bool]] = {
    "combine": lambda moe: moe.num_experts > 1,
    "merge_gates": lambda moe: moe.merges,
    "segment_length": _merges_sequences,
}


def _notes(config: RunConfig) -> Iterator[str]:
    moe, weight = config.moe, config.distill.load_balancing_weight
    if not moe.merges:
        return
    if moe.top_k == 1:
        learns = (
            "of all losses distill.load_balancing_weight alone teaches the gates"
            if weight
            else "with distill.load_balancing_weight=0 no loss teaches the gates"
        )
        yield f"moe.top_k=1 merges one expert, with the weight 1: nothing is mixed, and {learns}"
    elif weight == 0 and moe.top_k < moe.num_experts and not _may_not_balance(config):
        yield (
            f"distill.load_balancing_weight=0 leaves it to the gates' noise alone to try other "
            f"experts than the {moe.top_k} of {moe.num_experts} that merge; published is 0.01 for "
            "each gate, of all of which the loss is the mean"
        )
    if moe.top_k > 1 and moe.partition != "full_copy":
        shared = moe.num_shared_neurons
        kept = (
            f"the first {shared} neurons are the same in all of them, the others" if shared else ""
        )
        yield (
            f"moe.partition={moe.partition} gives experts different neurons, and merging averages "
            f"them by their place in the expert: {kept or 'neurons'} that have nothing to do with "
            "each other become one, so the student starts far from its teacher (only full_copy "
            "keeps the function)"
            + (
                "; token_clusters tells kinds of tokens apart, and its gates are not taken over: "
                "those of merged experts read a task or a sequence and start at zero"
                if moe.partition == "token_clusters"
                else ""
            )
        )


def _may_not_balance(config: RunConfig) -> bool:
    """Whether a batch is of one task, for which all of it merges alike."""
    return bool(config.data.tasks) and config.moe.router_spec.facts.chooses_by == "task"


def _combine_fits_router(config: RunConfig) -> Iterator[str]:
    moe = config.moe
    if moe.num_experts == 1 or moe.combine == "auto":
        return
    if moe.combine == "merge" and not moe.merges:
        yield (
            f"moe.combine=merge merges experts into one, and moe.router={moe.router} sends tokens "
            f"to them; use router {either(MERGED)}, or combine auto."
        )
    if moe.combine == "dispatch" and moe.merges:
        other = "task_gate" if moe.router_spec.facts.chooses_by == "task" else "token_gate"
        yield (
            f"moe.combine=dispatch sends tokens to experts, and moe.router={moe.router} merges "
            f"them into one; set combine to auto or merge, or use router {other}."
        )


def _merging_leaves_no_room(config: RunConfig) -> Iterator[str]:
    moe = config.moe
    if not moe.merges:
        return
    if moe.capacity_factor is not None:
        yield (
            f"moe.capacity_factor={moe.capacity_factor:g} limits the tokens that an expert takes, "
            "and no tokens travel to merged experts; remove it."
        )
    for key in ("gate_noise", "gate_jitter"):
        value = getattr(moe, key)
        if value > 0:
            yield (
                f"moe.{key}={value:g} is the noise of other gates, and those of moe.router="
                f"{moe.router} learn how much noise they draw; set it to 0."
            )
    for key in ("z_loss_weight", "entropy_weight"):
        value = getattr(config.distill, key)
        if value > 0:
            yield (
                f"distill.{key}={value:g} is over what gates say of each token, and those of "
                f"moe.router={moe.router} speak of groups of tokens; set it to 0 "
                "(distill.load_balancing_weight is over groups)."
            )
    if moe.gate_scale != "straight_through":
        yield (
            f"moe.gate_scale={moe.gate_scale} scales what one expert gives, and the weights of "
            "merged experts sum to 1; leave it out."
        )
    if moe.router == "merged_task" and moe.task_map == "fixed":
        yield (
            "moe.task_map=fixed gives tasks fixed experts, and moe.router=merged_task learns how "
            "to merge them; use task_gate, or task_map learned."
        )
    if moe.fit_output is True:
        yield (
            f"moe.fit_output fits experts that work alone, and moe.router={moe.router} merges them "
            "with gates that start alike: only their mean could be fitted; set fit_output to auto "
            "or false."
        )


def _merged_by_sequence_on_one_rank(config: RunConfig) -> Iterator[str]:
    moe, ranks = config.moe, config.parallel.ep_size
    if moe.merges and ranks > 1 and moe.router_spec.facts.chooses_by != "task":
        yield (
            f"parallel.ep_size={ranks} spreads experts over workers, and moe.router={moe.router} "
            "merges all of them anew for each sequence, so that every worker would send its "
            "weights to all others; set ep_size to 1 (parallel.zero_stage spreads moments and "
            "gradients)."
        )


_MERGE = ("moe.num_experts", "moe.router", "moe.combine")
MERGE_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_combine_fits_router, _MERGE),
    (
        _merging_leaves_no_room,
        (
            *_MERGE,
            "moe.capacity_factor",
            "moe.gate_noise",
            "moe.gate_jitter",
            "moe.gate_scale",
            "moe.task_map",
            "moe.fit_output",
            "distill.z_loss_weight",
            "distill.entropy_weight",
        ),
    ),
    (_merged_by_sequence_on_one_rank, (*_MERGE, "parallel.ep_size")),
)
