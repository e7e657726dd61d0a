"""The table of routers: each chooses experts for every token.

A new router is one class and one row of `ROUTERS`.
Shapes: D model, E experts, K active experts, V vocabulary, N tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.gates import SentenceGate, TaskGate, TaskTable, TokenGate, spread_tasks
from moe_dist.moe.hash_router import HashRouter
from moe_dist.moe.hash_tables import balanced_table, random_table

TASK_MAPS = ("learned", "fixed")


@dataclass(frozen=True)
class RouterOptions:
    """Everything that a row of `ROUTERS` may read; see `build_router`."""

    d_model: int
    num_experts: int
    top_k: int
    vocab_size: int | None
    seed: int
    token_counts: Tensor | None
    num_tasks: int | None
    gate_scale: str
    gate_noise: float
    gate_jitter: float
    task_map: str
    table: Tensor | None


def build_router(
    name: str,
    *,
    d_model: int,
    num_experts: int,
    top_k: int = 1,
    vocab_size: int | None = None,
    seed: int = 0,
    token_counts: Tensor | None = None,
    num_tasks: int | None = None,
    gate_scale: str = "straight_through",
    gate_noise: float = 0.0,
    gate_jitter: float = 0.0,
    task_map: str = "learned",
    table: Tensor | None = None,
) -> nn.Module:
    """Build a router by its name in `ROUTERS`.

    Args:
        name: a key of `ROUTERS`.
        d_model: width of the hidden states.
        num_experts: experts to choose from.
        top_k: experts for each token.
        vocab_size: rows of a hash table; needed by hash_random without `table`.
        seed: of the hash table; give each layer its own.
        token_counts: (V,) counts on the training split; needed by hash_balanced without `table`.
        num_tasks: needed by task_gate.
        gate_scale: see `Gate`.
        gate_noise: see `Gate`; nothing for routers without a gate.
        gate_jitter: see `TokenGate`; nothing for routers that do not read hidden states.
        task_map: of task_gate: "learned" scores, or "fixed" experts for each task.
        table: a ready table of token ids or tasks, instead of a fresh one.

    Returns:
        The router, a module that follows the `Router` protocol.

    Raises:
        ConversionError: if there is no router of that name, or top_k does not fit.
        MissingInputError: if the router needs something that was not given.
    """
    if name not in ROUTERS:
        raise ConversionError(
            f"there is no router named {name!r}",
            remedy=f"use one of: {', '.join(ROUTERS)}",
        )
    if not 1 <= top_k <= num_experts:
        raise ConversionError(
            f"top_k={top_k} does not fit num_experts={num_experts}",
            remedy=f"choose top_k between 1 and {num_experts}",
        )
    if task_map not in TASK_MAPS:
        raise ConversionError(
            f"there is no task map {task_map!r}", remedy=f"use one of: {', '.join(TASK_MAPS)}"
        )
    return ROUTERS[name](
        RouterOptions(
            d_model=d_model,
            num_experts=num_experts,
            top_k=top_k,
            vocab_size=vocab_size,
            seed=seed,
            token_counts=token_counts,
            num_tasks=num_tasks,
            gate_scale=gate_scale,
            gate_noise=gate_noise,
            gate_jitter=gate_jitter,
            task_map=task_map,
            table=table,
        )
    )


def _hash_random(options: RouterOptions) -> nn.Module:
    table = options.table
    if table is None:
        if options.vocab_size is None:
            raise MissingInputError(
                "hash_random needs the size of the vocabulary",
                remedy="pass vocab_size, the rows of the model's token embedding",
            )
        table = random_table(
            options.vocab_size,
            options.num_experts,
            seed=options.seed,
            top_k=options.top_k,
        )
    return HashRouter(table, options.num_experts)


def _hash_balanced(options: RouterOptions) -> nn.Module:
    table = options.table
    if table is None:
        if options.token_counts is None:
            raise MissingInputError(
                "hash_balanced needs the token counts of the training split",
                remedy="pass token_counts=torch.bincount(all training ids, minlength=vocab_size), "
                "or use hash_random",
            )
        if options.vocab_size not in (None, len(options.token_counts)):
            raise MissingInputError(
                f"hash_balanced was given {len(options.token_counts)} token counts for a "
                f"vocabulary of {options.vocab_size}",
                remedy="count with minlength=vocab_size, the rows of the token embedding",
            )
        table = balanced_table(
            options.token_counts,
            options.num_experts,
            seed=options.seed,
            top_k=options.top_k,
        )
    return HashRouter(table, options.num_experts)


def _token_gate(options: RouterOptions) -> nn.Module:
    return _gate_on_hidden_states(TokenGate, options)


def _sentence_gate(options: RouterOptions) -> nn.Module:
    return _gate_on_hidden_states(SentenceGate, options)


def _gate_on_hidden_states(kind: type[TokenGate], options: RouterOptions) -> nn.Module:
    return kind(
        options.d_model,
        options.num_experts,
        top_k=options.top_k,
        gate_scale=options.gate_scale,
        noise=options.gate_noise,
        jitter=options.gate_jitter,
        seed=options.seed,
    )


def _task_gate(options: RouterOptions) -> nn.Module:
    if options.table is not None:
        return TaskTable(options.table, options.num_experts)
    if not options.num_tasks:
        raise MissingInputError(
            "task_gate needs the number of tasks",
            remedy="pass num_tasks; with one task all tokens go to the same experts",
        )
    if options.task_map == "fixed":
        table = spread_tasks(options.num_tasks, options.num_experts, options.top_k)
        return TaskTable(table, options.num_experts)
    return TaskGate(
        options.num_tasks,
        options.num_experts,
        top_k=options.top_k,
        gate_scale=options.gate_scale,
        noise=options.gate_noise,
        seed=options.seed,
    )


ROUTERS: dict[str, Callable[[RouterOptions], nn.Module]] = {
    "hash_random": _hash_random,
    "hash_balanced": _hash_balanced,
    "token_gate": _token_gate,
    "sentence_gate": _sentence_gate,
    "task_gate": _task_gate,
}
