"""What routers read and what they return, and how both pass through an unforked forward.

A layer inside someone else's ``forward`` is handed only hidden states. What a router needs
beside them (token ids, mask, task) travels in one `RoutingContext` for each forward call of a
Transformer stack; what the routers decided is collected by a caller who asks for it with
`record_routing`. Both live in context variables, so threads and models do not see each other's.

Shapes: B batch, S sequence, T tokens, D model, E experts, K active experts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moe_dist.errors import MissingInputError
from moe_dist.moe.padding import real_tokens
from moe_dist.moe.segment_cache import keep_states, kept_merges, past_states
from moe_dist.moe.segments import SegmentState

CHOSEN_TASK = "chosen_task"
"""Attribute of a stack: the number of the task that it is used for where no context names one."""


@dataclass(frozen=True)
class Routing:
    """One layer's decision for T tokens.

    Args:
        expert_ids: (T, K) int64, the experts of each token, best first.
        expert_weights: (T, K), the compute dtype, or float32 of merged experts; differentiable
            where the router learns.
        logits: (T, E) float32, or None where the router has none (hash).
        unit_weights: True only if each token has one expert, its weight is the constant 1 and
            carries no gradient; a dispatcher may then skip the multiplication.
        kept: (T, K) bool, False where a full expert turned the token away (its weight is 0);
            None where nothing is dropped.
        clean_logits: of a gate whose noise learns (T, E) float32 scores before the noise.
        noise_std: of such a gate, in training, the (T, E) float32 size of the noise; else None.
    """

    expert_ids: Tensor
    expert_weights: Tensor
    logits: Tensor | None = None
    unit_weights: bool = False
    kept: Tensor | None = None
    clean_logits: Tensor | None = None
    noise_std: Tensor | None = None


@dataclass(frozen=True)
class RoutingContext:
    """What routers may read about the tokens of one forward call.

    Args:
        token_ids: (B, S) ids, or None where the stack was given embeddings.
        mask: (B, S) bool, True for real tokens; None if all are real.
        task_ids: (B,) ids of the task of each sample, or None.
        causal: no token may see a later one, as in a decoder.
        has_past: earlier tokens are in a key-value cache and not among these.
        sample_ids: (B,) numbers of the samples, by which noise and jitter are drawn; None where
            they have no numbers.
        noise_seed: of noise and jitter; None draws one from torch's generator.
        past_segments: by layer what its gate has seen of the tokens in the key-value cache.
        seen_segments: where a gate writes, by layer, what the next forward call must know; None
            where there is none to come.
        kept_merges: by layer what `moe_dist.moe.kept_merges` keeps in the key-value cache; changed.
        mask_fault: what the stack was given where that does not tell padding from tokens.
    """

    token_ids: Tensor | None = None
    mask: Tensor | None = None
    task_ids: Tensor | None = None
    causal: bool = False
    has_past: bool = False
    sample_ids: Tensor | None = None
    noise_seed: int | None = None
    past_segments: Mapping[str, SegmentState] = field(default_factory=dict)
    seen_segments: dict[str, SegmentState] | None = None
    kept_merges: dict[str, Any] = field(default_factory=dict)
    mask_fault: str = ""


@dataclass(frozen=True)
class LayerRouting:
    """One MoE layer's routing in one forward call.

    Of merged experts there is one for each gate, named `<layer>.<linear layer>` (`<layer>.ffn` for
    a gate of all), and its rows are groups of tokens that share a merge.

    Args:
        name: the layer's name.
        num_experts: how many experts it has.
        routing: what its router returned.
        mask_T: (T,) bool, True for real tokens; None if all are real.
    """

    name: str
    num_experts: int
    routing: Routing
    mask_T: Tensor | None


@dataclass
class RoutingRecord:
    """What was routed while `record_routing` was active: one entry per layer and forward."""

    entries: list[LayerRouting] = field(default_factory=list)


@runtime_checkable
class Router(Protocol):
    """Chooses experts. Implementations are modules, so that tables and gates are saved."""

    num_experts: int
    top_k: int

    def __call__(self, hidden_TD: Tensor, context: RoutingContext | None) -> Routing:
        """Route T tokens."""
        ...


@dataclass(frozen=True)
class _Frame:
    """One open forward call; `owner` tells a stack's hook its own frame from another's."""

    context: RoutingContext
    owner: nn.Module | None
    outer: _Frame | None


_FRAME: ContextVar[_Frame | None] = ContextVar("moe_dist_routing_frame", default=None)
_RECORD: ContextVar[RoutingRecord | None] = ContextVar("moe_dist_routing_record", default=None)


def current_context() -> RoutingContext | None:
    """Return the context of this thread's innermost open forward call, None outside any."""
    frame = _FRAME.get()
    return None if frame is None else frame.context


@contextmanager
def use_context(context: RoutingContext) -> Iterator[RoutingContext]:
    """Make `context` the current one inside the `with` block, in this thread only."""
    outer = _FRAME.get()
    _FRAME.set(_Frame(context, None, outer))
    try:
        yield context
    finally:
        _FRAME.set(outer)


@contextmanager
def use_task(task: int | None) -> Iterator[None]:
    """Name the task of forward calls inside the block, in this thread; None changes nothing."""
    if task is None:
        yield
        return
    outer = current_context() or RoutingContext()
    with use_context(replace(outer, task_ids=torch.tensor([task], device="cpu"))):
        yield


@contextmanager
def use_samples(sample_ids: Tensor, noise_seed: int) -> Iterator[None]:
    """Number the (B,) samples of forward calls inside the `with` block, in this thread only.

    What gates draw then depends on seed (give each step its own), sample, place in the sample and
    layer, and not on what else is in the batch.
    """
    outer = current_context() or RoutingContext()
    with use_context(replace(outer, sample_ids=sample_ids, noise_seed=noise_seed)):
        yield


@contextmanager
def record_routing() -> Iterator[RoutingRecord]:
    """Collect the routing, with its graph, of every MoE layer that runs inside the `with` block.

    Blocks nest: the innermost one collects. Layers recomputed for gradient checkpointing do not
    appear twice if the checkpoint was given `checkpoint_context_fn`.
    """
    outer = _RECORD.get()
    record = RoutingRecord()
    _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.set(outer)


def append_routing(name: str, num_experts: int, routing: Routing) -> None:
    """Add one layer's routing to the active record; do nothing where none is active."""
    record = _RECORD.get()
    if record is None:
        return
    mask_T = padding_mask(name, routing.expert_ids.shape[0], current_context())
    record.entries.append(LayerRouting(name, num_experts, routing, mask_T))


def append_merge(name: str, num_experts: int, routing: Routing, real_G: Tensor | None) -> None:
    """Add what one gate chose for G groups, of which some hold padding alone, to the record."""
    record = _RECORD.get()
    if record is not None:
        record.entries.append(LayerRouting(name, num_experts, routing, real_G))


def padding_mask(name: str, num_tokens: int, context: RoutingContext | None) -> Tensor | None:
    """Tell which tokens of a layer are real: (T,) bool, or None if all are.

    A mask that does not tell, or not cover the layer's tokens, is a MissingInputError.
    """
    check_padding_is_known(context, f"MoE layer {name!r}")
    if context is None or context.mask is None:
        return None
    mask_T = context.mask.reshape(-1)
    if mask_T.numel() != num_tokens:
        raise MissingInputError(
            f"MoE layer {name!r} sees {num_tokens} tokens, but the mask of this forward call "
            f"has {mask_T.numel()}, so padding cannot be told from tokens",
            remedy="set chunk_size_feed_forward=0 and pass a mask of the input's own shape",
        )
    return mask_T


def check_padding_is_known(context: RoutingContext | None, reader: str) -> None:
    """See that the call's mask tells padding from tokens, else it is a MissingInputError."""
    if context is not None and context.mask_fault:
        raise MissingInputError(
            f"{reader} must leave padding out, and was given {context.mask_fault}",
            remedy="pass the attention_mask of two dimensions, or of four whose tokens read all "
            "real ones before them (in an encoder all real ones); in generate leave out "
            "cache_implementation",
        )


def checkpoint_context_fn() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Carry the routing context into a gradient-checkpointed block's recomputation.

    Pass it as ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=...)``;
    without it the backward pass, which may run in another thread, finds no context.
    """
    return nullcontext(), _recomputation(_FRAME.get())


def install_routing_hooks(stack: nn.Module, *, causal: bool = False) -> None:
    """Open a `RoutingContext` around each forward of a stack; `causal` if it is a decoder.

    The hooks read ``input_ids``, ``attention_mask`` and ``task_ids`` by name, and can be copied
    and pickled with the stack. Installing twice changes nothing.
    """
    open_context = _open_causal_context if causal else _open_context
    if open_context in stack._forward_pre_hooks.values():
        return
    stack.register_forward_pre_hook(open_context, with_kwargs=True)
    stack.register_forward_hook(_close_context, always_call=True)


def remove_routing_hooks(stack: nn.Module) -> None:
    """Undo `install_routing_hooks`, for a stack whose routers read hidden states only."""
    own = (_open_context, _open_causal_context, _close_context)
    kinds = (
        (stack._forward_pre_hooks, stack._forward_pre_hooks_with_kwargs),
        (stack._forward_hooks, stack._forward_hooks_always_called),
    )
    for hooks, options in kinds:
        for key in [key for key, hook in hooks.items() if hook in own]:
            del hooks[key]
            options.pop(key, None)


@contextmanager
def _recomputation(frame: _Frame | None) -> Iterator[None]:
    outer_frame, outer_record = _FRAME.get(), _RECORD.get()
    _FRAME.set(frame)
    _RECORD.set(None)
    try:
        yield
    finally:
        _FRAME.set(outer_frame)
        _RECORD.set(outer_record)


def _open_causal_context(stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _open_context(stack, args, kwargs, causal=True)


def _open_context(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, causal: bool = False
) -> None:
    given = dict(zip(_parameter_names(stack.forward), args, strict=False)) | kwargs
    outer = _outside(stack, _FRAME.get())
    task_ids = given.get("task_ids")
    if task_ids is None and outer is not None:
        # Task heads pass only what the stack's forward accepts; the caller's context has the task.
        task_ids = outer.context.task_ids
    if task_ids is None and getattr(stack, CHOSEN_TASK, None) is not None:
        task_ids = torch.tensor([getattr(stack, CHOSEN_TASK)], device="cpu")
    token_ids = given.get("input_ids")
    if task_ids is not None and task_ids.numel() == 1 and isinstance(token_ids, Tensor):
        task_ids = task_ids.reshape(1).expand(token_ids.shape[0])
    cache = given.get("past_key_values")
    num_past = _num_past(given) if causal else 0
    drawn = RoutingContext() if outer is None else outer.context
    inputs = token_ids if token_ids is not None else given.get("inputs_embeds")
    mask, mask_fault = real_tokens(
        given.get("attention_mask"), inputs, num_past=num_past, causal=causal
    )
    context = RoutingContext(
        token_ids=token_ids,
        mask=mask,
        mask_fault=mask_fault,
        task_ids=task_ids,
        causal=causal,
        has_past=num_past > 0,
        sample_ids=drawn.sample_ids,
        noise_seed=drawn.noise_seed,
        past_segments=past_states(cache, num_past),
        seen_segments={} if causal and given.get("use_cache") is not False else None,
        kept_merges=kept_merges(cache),
    )
    _FRAME.set(_Frame(context, stack, outer))


def _close_context(stack: nn.Module, args: tuple[Any, ...], output: object) -> None:
    # Torch calls this also where an earlier hook failed and ours never opened a frame.
    frame = _FRAME.get()
    if frame is not None and frame.owner is stack:
        _FRAME.set(frame.outer)
        keep_states(output, frame.context.seen_segments or {}, frame.context.kept_merges)


def _outside(stack: nn.Module, frame: _Frame | None) -> _Frame | None:
    # Torch runs no hooks after Ctrl-C; a frame that this stack left behind must not be inherited.
    outer = frame
    while outer is not None:
        if outer.owner is stack:
            return _outside(stack, outer.outer)
        outer = outer.outer
    return frame


def _num_past(given: dict[str, Any]) -> int:
    length = getattr(given.get("past_key_values"), "get_seq_length", None)
    return 0 if length is None else int(length())


@functools.lru_cache(maxsize=256)
def _own_parameter_names(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _parameter_names(forward: Callable[..., Any]) -> list[str]:
    """Name what a forward takes; a method's are remembered, since reading them takes long."""
    function = getattr(forward, "__func__", None)
    if function is None:
        return list(inspect.signature(forward).parameters)
    return _own_parameter_names(function)[1:]
