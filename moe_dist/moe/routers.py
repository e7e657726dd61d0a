"""The table of routers: each chooses experts for every token.

A new router is one class, one row of `ROUTERS`, and one of `moe_dist.router_spec.ROUTER_FACTS`.
Shapes: D model, E experts, K active experts, V vocabulary, N tasks.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.gates import SentenceGate, TokenGate
from moe_dist.moe.hash_router import HashRouter
from moe_dist.moe.hash_tables import balanced_table, random_table
from moe_dist.moe.merge import linear_names
from moe_dist.moe.merge_gates import SequenceMergeGate, TaskMergeGate, TokenMergeGate
from moe_dist.moe.task_routers import TaskGate, TaskTable, spread_tasks
from moe_dist.router_spec import RouterSpec, TaskMap, router_facts

TASK_MAPS = typing.get_args(TaskMap)


@dataclass(frozen=True)
class RouterInputs:
    """What a row of `ROUTERS` may read beside the router's options; see `build_router`."""

    d_model: int
    num_experts: int
    vocab_size: int | None
    seed: int
    token_counts: Tensor | None
    num_tasks: int | None
    table: Tensor | None
    gated: bool


def build_router(
    router: str | RouterSpec,
    *,
    d_model: int,
    num_experts: int,
    vocab_size: int | None = None,
    seed: int = 0,
    token_counts: Tensor | None = None,
    num_tasks: int | None = None,
    table: Tensor | None = None,
    gated: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a router by its name in `ROUTERS`.

    Args:
        router: a key of `ROUTERS`, or the name with its options.
        d_model: width of the hidden states.
        num_experts: experts to choose from.
        vocab_size: rows of a hash table; needed by hash_random without `table`.
        seed: of the hash table; give each layer its own.
        token_counts: (V,) counts on the training split; needed by hash_balanced without `table`.
        num_tasks: needed by task_gate.
        table: a ready table of token ids or tasks, instead of a fresh one.
        gated: whether the experts are gated FFNs, whose linear layers are three; read by routers
            that merge.
        **options: fields of `RouterSpec`; those that a router has no use for do nothing.

    Returns:
        The router, a module that follows the `Router` protocol.

    Raises:
        ConversionError: if there is no router of that name, or top_k does not fit.
        MissingInputError: if the router needs something that was not given.
    """
    spec = RouterSpec.of(router, **options)
    merges = router_facts(spec.router).merges
    if not 1 <= spec.top_k <= num_experts:
        raise ConversionError(
            f"top_k={spec.top_k} does not fit num_experts={num_experts}",
            remedy=f"choose top_k between 1 and {num_experts}",
        )
    if spec.task_map not in TASK_MAPS:
        raise ConversionError(
            f"there is no task map {spec.task_map!r}", remedy=f"use one of: {', '.join(TASK_MAPS)}"
        )
    if merges and spec.capacity_factor is not None:
        raise ConversionError(
            f"capacity_factor={spec.capacity_factor:g} limits the tokens of an expert, and with "
            f"{spec.router} no tokens travel",
            remedy="leave it out",
        )
    inputs = RouterInputs(
        d_model=d_model,
        num_experts=num_experts,
        vocab_size=vocab_size,
        seed=seed,
        token_counts=token_counts,
        num_tasks=num_tasks,
        table=table,
        gated=gated,
    )
    return ROUTERS[spec.router](spec, inputs)


def _hash_random(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    table = inputs.table
    if table is None:
        if inputs.vocab_size is None:
            raise MissingInputError(
                "hash_random needs the size of the vocabulary",
                remedy="pass vocab_size, the rows of the model's token embedding",
            )
        table = random_table(
            inputs.vocab_size,
            inputs.num_experts,
            seed=inputs.seed,
            top_k=spec.top_k,
        )
    return HashRouter(table, inputs.num_experts)


def _hash_balanced(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    table = inputs.table
    if table is None:
        if inputs.token_counts is None:
            raise MissingInputError(
                "hash_balanced needs the token counts of the training split",
                remedy="pass token_counts=torch.bincount(all training ids, minlength=vocab_size), "
                "or use hash_random",
            )
        if inputs.vocab_size not in (None, len(inputs.token_counts)):
            raise MissingInputError(
                f"hash_balanced was given {len(inputs.token_counts)} token counts for a "
                f"vocabulary of {inputs.vocab_size}",
                remedy="count with minlength=vocab_size, the rows of the token embedding",
            )
        table = balanced_table(
            inputs.token_counts,
            inputs.num_experts,
            seed=inputs.seed,
            top_k=spec.top_k,
        )
    return HashRouter(table, inputs.num_experts)


def _token_gate(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    return _gate_on_hidden_states(TokenGate, spec, inputs)


def _sentence_gate(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    return _gate_on_hidden_states(SentenceGate, spec, inputs)


def _gate_on_hidden_states(
    kind: type[TokenGate], spec: RouterSpec, inputs: RouterInputs
) -> nn.Module:
    return kind(
        inputs.d_model,
        inputs.num_experts,
        top_k=spec.top_k,
        gate_scale=spec.gate_scale,
        noise=spec.gate_noise,
        jitter=spec.gate_jitter,
        seed=inputs.seed,
    )


def _task_gate(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    if inputs.table is not None:
        return TaskTable(inputs.table, inputs.num_experts)
    if not inputs.num_tasks:
        raise MissingInputError(
            "task_gate needs the number of tasks",
            remedy="pass num_tasks; with one task all tokens go to the same experts",
        )
    if spec.task_map == "fixed":
        table = spread_tasks(inputs.num_tasks, inputs.num_experts, spec.top_k)
        return TaskTable(table, inputs.num_experts)
    return TaskGate(
        inputs.num_tasks,
        inputs.num_experts,
        top_k=spec.top_k,
        gate_scale=spec.gate_scale,
        noise=spec.gate_noise,
        seed=inputs.seed,
    )


def _merged_task(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    return TaskMergeGate(
        # Without heads of several tasks all that a model does is one.
        inputs.num_tasks or 1,
        inputs.d_model,
        inputs.num_experts,
        linears=linear_names(inputs.gated),
        top_k=spec.top_k,
        one_gate=spec.merge_gates == "one",
        seed=inputs.seed,
    )


def _merged_sequence(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    return _merged_by_sequence(SequenceMergeGate, spec, inputs)


def _merged_token(spec: RouterSpec, inputs: RouterInputs) -> nn.Module:
    return _merged_by_sequence(TokenMergeGate, spec, inputs)


def _merged_by_sequence(
    kind: type[SequenceMergeGate], spec: RouterSpec, inputs: RouterInputs
) -> nn.Module:
    return kind(
        inputs.d_model,
        inputs.num_experts,
        linears=linear_names(inputs.gated),
        top_k=spec.top_k,
        one_gate=spec.merge_gates == "one",
        segment_length=spec.segment_length,
        seed=inputs.seed,
    )


ROUTERS: dict[str, Callable[[RouterSpec, RouterInputs], nn.Module]] = {
    "hash_random": _hash_random,
    "hash_balanced": _hash_balanced,
    "token_gate": _token_gate,
    "sentence_gate": _sentence_gate,
    "task_gate": _task_gate,
    "merged_task": _merged_task,
    "merged_sequence": _merged_sequence,
    "merged_token": _merged_token,
}
