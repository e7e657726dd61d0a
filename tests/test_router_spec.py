"""A router is one value from the recipe to the layer, and its row says what is true of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from moe_dist.config.moe_section import MoeConfig
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe import ROUTERS, MergeGate, build_router
from moe_dist.moe.gates import Gate
from moe_dist.router_spec import (
    FIRST_OPTIONS,
    NO_ROUTER,
    ROUTER_FACTS,
    RouterSpec,
)

CHANGED: dict[str, Any] = {
    "router": "sentence_gate",
    "top_k": 2,
    "gate_scale": "probability",
    "gate_noise": 0.5,
    "gate_jitter": 0.25,
    "task_map": "fixed",
    "capacity_factor": 1.5,
    "drop_policy": "probability",
    "merge_gates": "one",
    "segment_length": 64,
}


def build(spec: RouterSpec) -> torch.nn.Module:
    return build_router(
        spec,
        d_model=6,
        num_experts=4,
        vocab_size=9,
        token_counts=torch.arange(9),
        num_tasks=3,
    )


def test_recipe_and_router_have_the_same_options_and_defaults() -> None:
    assert MoeConfig().router_spec == RouterSpec()
    assert set(CHANGED) == {one.name for one in fields(RouterSpec)}
    assert MoeConfig(**CHANGED).router_spec == RouterSpec(**CHANGED)
    assert set(FIRST_OPTIONS) < set(CHANGED)


def test_options_given_beside_a_value_go_before_its_own() -> None:
    spec = RouterSpec(router="token_gate", top_k=2, gate_noise=0.5)
    assert RouterSpec.of(spec) == spec
    assert RouterSpec.of(spec, top_k=1) == RouterSpec(router="token_gate", gate_noise=0.5)
    assert RouterSpec.of("token_gate", top_k=2, gate_noise=0.5) == spec


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("task_map", ["learned", "fixed"])
def test_the_facts_are_those_of_the_router_that_is_built(name: str, task_map: Any) -> None:
    spec = RouterSpec(router=name, task_map=task_map)
    router = build(spec)
    assert isinstance(router, MergeGate) is spec.facts.merges
    assert isinstance(router, Gate) is (spec.has_gate and not spec.facts.merges)
    assert bool(list(router.parameters())) is spec.has_gate
    assert hasattr(router, "jitter") is (spec.facts.reads_hidden and not spec.facts.merges)


@pytest.mark.parametrize("name", ROUTERS)
def test_only_routers_that_read_token_counts_miss_them(name: str) -> None:
    def build_without() -> torch.nn.Module:
        return build_router(name, d_model=6, num_experts=4, vocab_size=9, num_tasks=3)

    if ROUTER_FACTS[name].reads_token_counts:
        with pytest.raises(MissingInputError, match="token counts"):
            build_without()
    else:
        build_without()


@pytest.mark.parametrize("name", ["magic", NO_ROUTER])
def test_an_unknown_router_is_named_with_those_there_are(name: str) -> None:
    with pytest.raises(ConversionError, match=f"no router named '{name}'\n.*task_gate"):
        build(RouterSpec(router=name))
    with pytest.raises(ConversionError, match="no router named"):
        _ = RouterSpec(router=name).facts
