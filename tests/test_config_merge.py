"""Recipes of merged experts: what is accepted, what is refused and why, and what is said."""

from __future__ import annotations

from typing import Any

import pytest

from moe_dist.config import RunConfig, build_config
from moe_dist.config.merge_checks import merge_notes, segment_faults
from moe_dist.config.search_space import table_values
from moe_dist.errors import ConfigError

COPIES: dict[str, Any] = {
    "num_experts": 8,
    "expert_size": 64,
    "num_shared_neurons": 0,
    "partition": "full_copy",
    "router": "merged_sequence",
    "top_k": 4,
}
BALANCED: dict[str, Any] = {"load_balancing_weight": 0.1}
MERGED = ("merged_task", "merged_sequence", "merged_token")
every_level = pytest.mark.parametrize("router", MERGED)


def raw(**changes: dict[str, Any]) -> dict[str, Any]:
    data = {"source": "hub", "name": "nyu-mll/glue", "subset": "rte"}
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": {"teacher": "some/encoder"},
        "data": data,
        "moe": COPIES,
    }
    for section, keys in changes.items():
        settings[section] = {**settings.get(section, {}), **keys}
    return settings


def build(**changes: dict[str, Any]) -> RunConfig:
    return build_config(raw(**changes))


def notes(**changes: dict[str, Any]) -> list[str]:
    return merge_notes(build(**{"distill": BALANCED, **changes}))


def only_fault(**changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    (fault,) = caught.value.faults
    return fault


@every_level
@pytest.mark.parametrize("key", ["z_loss_weight", "entropy_weight"])
def test_losses_over_tokens_are_none_of_groups(router: str, key: str) -> None:
    fault = only_fault(moe={"router": router}, distill={key: 0.1})
    assert "speak of groups of tokens; set it to 0" in fault
    assert build(distill={"load_balancing_weight": 0.1}).moe.merges


@every_level
@pytest.mark.parametrize("combine", ["auto", "merge"])
def test_a_merged_router_says_how_experts_come_together(router: str, combine: str) -> None:
    moe = build(moe={"router": router, "combine": combine}).moe
    assert moe.merges
    assert not moe.fits_output
    # One expert's neurons, whatever K is.
    assert moe.active_neurons == 64
    assert build(moe={"router": "token_gate"}).moe.active_neurons == 4 * 64


def test_tied_neurons_are_part_of_the_one_expert() -> None:
    sizes = {"partition": "importance", "num_shared_neurons": 16, "tie_shared": True}
    assert build(moe=sizes).moe.active_neurons == 64


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        (
            {"router": "token_gate", "combine": "merge"},
            "moe.combine=merge merges experts into one, and moe.router=token_gate sends tokens to "
            "them; use router merged_task, merged_sequence or merged_token, or combine auto.",
        ),
        (
            {"combine": "dispatch"},
            "moe.combine=dispatch sends tokens to experts, and moe.router=merged_sequence merges "
            "them into one; set combine to auto or merge, or use router token_gate.",
        ),
        ({"capacity_factor": 1.5}, "no tokens travel to merged experts; remove it."),
        ({"gate_noise": 0.5}, "learn how much noise they draw; set it to 0."),
        ({"gate_jitter": 0.5}, "learn how much noise they draw; set it to 0."),
        ({"gate_scale": "probability"}, "the weights of merged experts sum to 1; "),
        ({"router": "merged_task", "task_map": "fixed"}, "use task_gate, or task_map learned."),
        ({"fit_output": True}, "set fit_output to auto or false."),
    ],
)
def test_what_merging_leaves_no_room_for_is_refused(moe: dict[str, Any], words: str) -> None:
    assert words in only_fault(moe=moe)


@pytest.mark.parametrize("router", ["merged_sequence", "merged_token"])
def test_experts_that_are_merged_by_sequence_are_not_spread(router: str) -> None:
    fault = only_fault(moe={"router": router}, parallel={"num_workers": 2, "ep_size": 2})
    assert fault.startswith("parallel.ep_size=2 spreads experts over workers, and moe.router=")
    assert fault.endswith("set ep_size to 1 (parallel.zero_stage spreads moments and gradients).")


def test_one_expert_is_not_merged() -> None:
    """The dense comparison of a merged recipe keeps keys that nobody reads."""
    config = build_config(raw(moe={"combine": "merge"}) | {"compare": ["dense"]})
    dense = config.resolve_comparison("dense").moe
    assert (dense.num_experts, dense.expert_size, dense.merges) == (1, 64, False)


def test_several_tasks_of_a_merged_router_have_no_balance_within_a_batch() -> None:
    tasks = {
        name: {"source": "hub", "name": "nyu-mll/glue", "subset": name} for name in ("rte", "sst2")
    }
    settings = raw(moe={"router": "merged_task"}, distill={"load_balancing_weight": 0.1})
    settings["data"] = {"source": "tasks", "tasks": tasks}
    with pytest.raises(ConfigError, match="a batch is of one task; set it to 0"):
        build_config(settings)
    del settings["distill"]
    assert build_config(settings).moe.merges


def test_a_partition_that_merging_mixes_is_said() -> None:
    assert notes() == []
    assert notes(moe={"router": "token_gate", "partition": "importance"}) == []
    (note,) = notes(moe={"partition": "importance", "num_shared_neurons": 16})
    assert "moe.partition=importance gives experts different neurons" in note
    assert "the first 16 neurons are the same in all of them" in note
    (note,) = notes(moe={"partition": "token_clusters"})
    assert "its gates are not taken over" in note
    # Of one expert at a time nothing is mixed.
    (note,) = notes(moe={"top_k": 1, "partition": "importance"})
    assert "moe.top_k=1 merges one expert" in note
    assert note.endswith("of all losses distill.load_balancing_weight alone teaches the gates")


def test_comparisons_have_notes_of_their_own() -> None:
    settings = raw(distill=BALANCED) | {"compare": {"split": {"moe.partition": "random"}}}
    (note,) = merge_notes(build_config(settings))
    assert note.startswith("compare.split: moe.partition=random")


def test_what_is_so_of_several_students_is_said_once() -> None:
    others: dict[str, Any] = {
        "task": {"moe.router": "merged_task"},
        "token": {"moe.router": "merged_token"},
    }
    settings = raw(moe={"top_k": 1}, distill=BALANCED) | {"compare": others}
    (note,) = merge_notes(build_config(settings))
    assert note.startswith("moe.top_k=1 merges one expert")
    settings["moe"] = {**settings["moe"], "router": "token_gate"}
    (note,) = merge_notes(build_config(settings))
    assert note.startswith("compare.task, compare.token: moe.top_k=1 merges one expert")


@every_level
def test_experts_that_noise_alone_tries_are_said(router: str) -> None:
    unbalanced: dict[str, Any] = {"load_balancing_weight": 0}
    (note,) = notes(moe={"router": router}, distill=unbalanced)
    assert "leaves it to the gates' noise alone to try other experts than the 4 of 8" in note
    assert notes(moe={"router": router, "top_k": 8}, distill=unbalanced) == []
    (note,) = notes(moe={"router": router, "top_k": 1}, distill=unbalanced)
    assert note.endswith("with distill.load_balancing_weight=0 no loss teaches the gates")


def test_where_no_balance_is_allowed_none_is_missed() -> None:
    tasks = {
        name: {"source": "hub", "name": "nyu-mll/glue", "subset": name} for name in ("rte", "sst2")
    }
    settings = raw(moe={"router": "merged_task"})
    settings["data"] = {"source": "tasks", "tasks": tasks}
    assert merge_notes(build_config(settings)) == []
    settings["moe"] = COPIES
    (note,) = merge_notes(build_config(settings))
    assert "noise alone" in note


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        (
            {"num_experts": 1, "top_k": 1, "merge_gates": "one"},
            "moe.merge_gates=one changes nothing: moe.num_experts=1 leaves nothing to be merged; "
            "leave it out",
        ),
        (
            {"num_experts": 1, "top_k": 1, "combine": "merge"},
            "moe.combine=merge changes nothing: moe.num_experts=1 leaves nothing to be merged; "
            "leave it out",
        ),
        (
            {"router": "token_gate", "merge_gates": "one"},
            "moe.merge_gates=one changes nothing: moe.router=token_gate merges no experts; leave "
            "it out",
        ),
        (
            {"router": "merged_task", "segment_length": 64},
            "moe.segment_length=64 changes nothing: moe.router=merged_task merges for each task, "
            "whatever the sequence; leave it out",
        ),
    ],
)
def test_keys_that_nobody_reads_are_said(moe: dict[str, Any], words: str) -> None:
    assert notes(moe=moe) == [words]


def test_a_key_that_another_student_reads_is_no_mistake() -> None:
    keys: dict[str, Any] = {"segment_length": 64, "merge_gates": "one"}
    settings = raw(moe=keys, distill=BALANCED) | {"compare": ["dense"]}
    assert merge_notes(build_config(settings)) == []
    settings = raw(moe={**keys, "router": "token_gate"}, distill=BALANCED)
    assert len(merge_notes(build_config(settings))) == 2
    merged = {"moe.router": "merged_sequence"}
    assert merge_notes(build_config(settings | {"compare": {"merged": merged}})) == []
    space = {"space": {"moe.router": {"choice": ["token_gate", "merged_sequence"]}}}
    assert merge_notes(build_config(settings | {"search": space})) == []
    settings = raw(distill=BALANCED)
    settings["compare"] = {"plain": {"moe.router": "token_gate", "moe.merge_gates": "one"}}
    (note,) = merge_notes(build_config(settings))
    assert note.startswith("compare.plain: moe.merge_gates=one changes nothing")


def test_encoders_have_no_segments() -> None:
    config = build(moe={"segment_length": 64})
    (fault,) = segment_faults(config, decodes=False)
    assert fault.startswith("moe.segment_length=64 divides what a decoder reads")
    assert segment_faults(config, decodes=True) == []
    assert segment_faults(build(), decodes=False) == []
    # That it is not read is said otherwise.
    other = build(moe={"segment_length": 64, "router": "token_gate"})
    assert segment_faults(other, decodes=False) == []


def test_tables_of_a_search_hold_one_way_to_combine_each() -> None:
    assert set(table_values("merged_routers")) == set(MERGED)
    assert not set(table_values("routers")) & set(MERGED)
    space = {"moe.router": {"from": "merged_routers"}, "moe.top_k": {"choice": [2, 4]}}
    assert build(search={"space": space}).search.space
