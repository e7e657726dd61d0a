"""Norms and rotations of decoders in few passes over memory, where they learn in bfloat16 on a CPU.

transformers writes both as many operators, each of which reads and writes all hidden states, and
autocast then casts what a norm gives once for each linear layer behind it. Here some rows at a time
go through all of it while they are in the cache. Results are the same but for rounding.

Shapes: B texts, H heads, S tokens of a text, W width of a head, T tokens, D width of the model.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CACHED_BYTES = 2**19
"""What the rows that go through all passes together take, in float32."""
_LLAMA_KIND = ("Llama", "Mistral", "Qwen2", "Qwen3")
_RMS_NORMS = {"T5LayerNorm", *(f"{name}RMSNorm" for name in _LLAMA_KIND)}
_ATTENTIONS = {f"{name}Attention" for name in _LLAMA_KIND}
_LINEAR_READERS = {"input_layernorm": "self_attn", "post_attention_layernorm": "mlp"}
"""Norms of a block of Llama's kind, and what reads them: linear layers alone, if not a router."""
_ROTATION = "apply_rotary_pos_emb"


@contextmanager
def half_blocks(*models: nn.Module) -> Iterator[None]:
    """Let models of Llama's kind, and T5's norms, compute so inside the block.

    It is for steps under autocast in bfloat16 on a CPU; all else is computed as before.
    """
    with ExitStack() as stack:
        for model in models:
            for block in list(model.modules()):
                stack.enter_context(_block_norms(block))
        for name in sorted(_rotating_modules(models)):
            module = importlib.import_module(name)
            stack.enter_context(_replaced(module, _ROTATION, _rotated))
        yield


@contextmanager
def _block_norms(block: nn.Module) -> Iterator[None]:
    """Replace the norms that are this module's own children."""
    with ExitStack() as stack:
        for name, norm in block.named_children():
            if type(norm).__name__ not in _RMS_NORMS:
                continue
            reader = getattr(block, _LINEAR_READERS.get(name, ""), None)
            to_half = type(reader).__name__.endswith(("Attention", "MLP"))
            stack.enter_context(_replaced(norm, "forward", partial(_norm, norm, to_half)))
        yield


@dataclass
class _Replacement:
    """A function that stands in for an owner's, for as long as somebody uses it."""

    had: bool
    before: Any
    value: Any
    num_users: int = 0


_lock = threading.Lock()
_replacements: dict[tuple[int, str], _Replacement] = {}


@contextmanager
def _replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let a function stand for the owner's, which it gets first; the last user puts that back."""
    key = (id(owner), name)
    with _lock:
        if key not in _replacements:
            value = partial(function, getattr(owner, name))
            own = vars(owner)
            _replacements[key] = _Replacement(name in own, own.get(name), value)
            setattr(owner, name, value)
        _replacements[key].num_users += 1
    try:
        yield
    finally:
        with _lock:
            found = _replacements[key]
            found.num_users -= 1
            if not found.num_users:
                del _replacements[key]
                # What somebody else has put there meanwhile stays.
                if vars(owner).get(name) is found.value:
                    if found.had:
                        setattr(owner, name, found.before)
                    else:
                        delattr(owner, name)


def _rotating_modules(models: tuple[nn.Module, ...]) -> set[str]:
    """Name the modules of transformers whose attention rotates as Llama's does."""
    return {
        type(module).__module__
        for model in models
        for module in model.modules()
        if type(module).__name__ in _ATTENTIONS
    }


def _is_half() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16


def _norm(
    norm: nn.Module, to_half: bool, own: Callable[[Tensor], Tensor], hidden: Tensor
) -> Tensor:
    weight_D = cast(Tensor, norm.weight)
    suits = hidden.device.type == "cpu" and hidden.is_contiguous() and hidden.numel() > 0
    if not suits or not _is_half() or {hidden.dtype, weight_D.dtype} != {torch.float32}:
        return own(hidden)
    dtype = torch.bfloat16 if to_half else torch.float32
    normed: Tensor = _RMSNorm.apply(hidden, weight_D, norm.variance_epsilon, dtype)
    return normed


def _rotated(
    own: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    halves = [one.dtype is torch.bfloat16 or one.dtype is torch.float32 for one in (query, key)]
    suits = all(halves) and query.device.type == "cpu" and unsqueeze_dim == 1 and cos.dim() == 3
    if not suits or not _is_half() or cos.shape[-1] != query.shape[-1] or cos.shape[-1] % 2:
        return own(query, key, cos, sin, unsqueeze_dim)
    turns = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
    return _Rotation.apply(query, *turns), _Rotation.apply(key, *turns)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight_D: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        hidden_TD = hidden.view(-1, hidden.shape[-1])
        scale_T1 = torch.linalg.vector_norm(hidden_TD, dim=-1, keepdim=True).square_()
        scale_T1.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        out_TD = torch.empty_like(hidden_TD, dtype=dtype)
        for rows in _in_cache(*hidden_TD.shape):
            out_TD[rows] = torch.mul(hidden_TD[rows], scale_T1[rows]).mul_(weight_D)
        ctx.save_for_backward(hidden_TD, scale_T1, weight_D)
        return out_TD.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, scale_T1, weight_D = ctx.saved_tensors
        grad_TD = grad.reshape(hidden_TD.shape)
        of_hidden_TD = torch.empty_like(hidden_TD)
        of_weight_D = torch.zeros_like(weight_D)
        for rows in _in_cache(*hidden_TD.shape):
            normed_TD = hidden_TD[rows] * scale_T1[rows]
            own_TD = torch.mul(normed_TD, grad_TD[rows], out=of_hidden_TD[rows])
            of_weight_D += own_TD.sum(dim=0)
            torch.mul(grad_TD[rows], weight_D, out=own_TD)
            along_T1 = torch.linalg.vecdot(own_TD, normed_TD).unsqueeze_(-1)
            own_TD.addcmul_(normed_TD, along_T1.div_(-len(weight_D))).mul_(scale_T1[rows])
        return of_hidden_TD.view(grad.shape), of_weight_D, None, None


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads_BHSW: Tensor, cos_B1SW: Tensor, sin_B1SW: Tensor) -> Tensor:
        ctx.save_for_backward(cos_B1SW, sin_B1SW)
        ctx.dtype = heads_BHSW.dtype
        return _turn(heads_BHSW, cos_B1SW, sin_B1SW, torch.bfloat16, backwards=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSW: Tensor) -> tuple[Tensor | None, ...]:
        cos_B1SW, sin_B1SW = ctx.saved_tensors
        return _turn(grad_BHSW, cos_B1SW, sin_B1SW, ctx.dtype, backwards=True), None, None


def _turn(
    heads_BHSW: Tensor,
    cos_B1SW: Tensor,
    sin_B1SW: Tensor,
    dtype: torch.dtype,
    *,
    backwards: bool,
) -> Tensor:
    """Rotate pairs of dimensions, of which one lies in each half of a head, or transpose that."""
    out_BHSW = torch.empty_like(heads_BHSW, dtype=dtype)
    half = heads_BHSW.shape[-1] // 2
    first, second = (..., slice(None, half)), (..., slice(half, None))
    signs = (1, -1) if backwards else (-1, 1)
    num_texts, num_heads, *sizes = heads_BHSW.shape
    for rows in _in_cache(num_texts, num_heads * sizes[0] * sizes[1]):
        cos, sin = (one if len(one) == 1 else one[rows] for one in (cos_B1SW, sin_B1SW))
        own = heads_BHSW[rows].float()
        turned = own * cos
        # Backwards each half meets the other's sine, which the two of a pair share as a rule.
        of_first, of_second = (sin[second], sin[first]) if backwards else (sin[first], sin[second])
        turned[first].addcmul_(own[second], of_first, value=signs[0])
        turned[second].addcmul_(own[first], of_second, value=signs[1])
        out_BHSW[rows] = turned
    return out_BHSW


def _in_cache(num_rows: int, width: int) -> Iterator[slice]:
    step = max(1, CACHED_BYTES // (width * torch.float32.itemsize))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)
