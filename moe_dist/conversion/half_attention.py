"""Attention in bfloat16 on a CPU, with a backward pass as fast as its forward pass.

Torch's own takes seven times as long in bfloat16 as in float32 where texts are short, which was
half of a distillation step. Where native operators are loaded, short texts have their own products
of blocks. Else the forward pass is torch's in bfloat16, and the backward pass its in float32, from
the same saved tensors, which is slower and a little nearer to the true gradients.

Shapes: B texts, H heads, Q queries, S keys, W width of a head.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@contextmanager
def half_attention() -> Iterator[None]:
    """Let all transformers models of this process attend so, where they learn in bfloat16 on a CPU.

    It is for models with `sdpa` attention, transformers' own choice; where somebody has put another
    function in its place, that one stays. What it does not take (a mask that learns, a cache,
    other dtypes and devices, and dropout where there are no products of blocks) is done as before.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _lock:
        _users.append(None)
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
    try:
        yield
    finally:
        with _lock:
            _users.pop()
            if not _users and ALL_ATTENTION_FUNCTIONS["sdpa"] is attend:
                del ALL_ATTENTION_FUNCTIONS["sdpa"]


_lock = threading.Lock()
_users: list[None] = []


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa` does: (B, H, Q, W) and so on to (B, Q, H, W)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    asked = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(asked) and attention_mask is None and query.shape[2] > 1
    special = (
        kwargs.get(name) for name in ("position_bias", "cache", "softcap", "output_attentions")
    )
    suits = all(not torch.is_tensor(one) and not one for one in special)
    if causal and query.shape[2] != key.shape[2]:
        suits = False
    suits = suits and _learns_in_half(query, key, value) and _is_fixed(attention_mask)
    in_blocks = suits and dropout < 1 and _suits_blocks(query, key, value)
    if not suits or (dropout and not in_blocks):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            *(module, query, key, value, attention_mask, dropout, scaling, is_causal), **kwargs
        )
        return found
    half = [one.to(torch.bfloat16) for one in (query, key, value)]
    if in_blocks:
        scale = half[0].shape[-1] ** -0.5 if scaling is None else scaling
        # Torch's own generator says what is drawn, so that its state is all there is to keep.
        seed = int(torch.randint(2**63 - 1, ())) if dropout else 0
        given = (*half, _in_float32(attention_mask))
        out_BHQW = _BlockAttention.apply(*given, causal, scale, dropout, seed)
    else:
        out_BHQW = _HalfAttention.apply(*half, _added(attention_mask), causal, scaling)
    # A copy: the backward pass reads what was given, and models may write over what they get.
    return out_BHQW.transpose(1, 2).clone(memory_format=torch.contiguous_format), None


def has_block_attention() -> bool:
    """Whether somebody has loaded the native operators, and this processor has what they need."""
    return hasattr(torch.ops.moe_dist, "attend") and _multiplies_half()


@functools.cache
def _multiplies_half() -> bool:
    return bool(torch.ops.moe_dist.multiplies(_BFLOAT16))


_BFLOAT16 = 1
"""The number that native operators know the precision by."""


def _suits_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    is_even = all(one.stride(2) % 2 == 0 for one in (query, key, value))
    return (
        query.shape[2] == key.shape[2]
        and is_even
        and has_block_attention()
        and bool(torch.ops.moe_dist.attends(*query.shape[2:]))
    )


def _learns_in_half(query: Tensor, key: Tensor, value: Tensor) -> bool:
    given = (query, key, value)
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in given):
        return False
    is_half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    if not is_half and any(tensor.dtype is not torch.bfloat16 for tensor in given):
        return False
    if any(tensor.dtype not in (torch.bfloat16, torch.float32) for tensor in given):
        return False
    # What the kernel takes for granted, and what torch itself looks at before it.
    is_plain = all(
        one.device.type == "cpu" and one.dim() == 4 and one.numel() and one.stride(-1) == 1
        for one in given
    )
    return (
        is_plain
        and key.shape == value.shape
        and (query.shape[0], query.shape[-1]) == (key.shape[0], key.shape[-1])
        and query.shape[1] % key.shape[1] == 0
    )


def _is_fixed(mask: Tensor | None) -> bool:
    if mask is None:
        return True
    is_added = mask.dtype is torch.bool or mask.is_floating_point()
    return is_added and not mask.requires_grad and mask.dim() in (2, 4)


def _added(mask: Tensor | None) -> Tensor | None:
    """Bring a mask of bools (True is seen) or of numbers into what is added to scores."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)


def _in_float32(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype is torch.bool else mask.float()


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHSW: Tensor,
        key_BHSW: Tensor,
        value_BHSW: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        times = query_BHSW.shape[1] // key_BHSW.shape[1]
        shared = (_for_each_head(tensor, times) for tensor in (key_BHSW, value_BHSW))
        settings = scale, is_causal, dropout, seed
        out_BHSW, logsumexp = torch.ops.moe_dist.attend(query_BHSW, *shared, mask, *settings)
        ctx.save_for_backward(query_BHSW, key_BHSW, value_BHSW, mask, out_BHSW, logsumexp)
        ctx.settings = settings
        return cast(Tensor, out_BHSW)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSW: Tensor) -> tuple[Tensor | None, ...]:
        if grad_BHSW.stride(-1) != 1 or grad_BHSW.stride(2) % 2:
            grad_BHSW = grad_BHSW.clone(memory_format=torch.contiguous_format)
        query_BHSW, key_BHSW, value_BHSW, *others = ctx.saved_tensors
        times = query_BHSW.shape[1] // key_BHSW.shape[1]
        shared = (_for_each_head(tensor, times) for tensor in (key_BHSW, value_BHSW))
        own, *of_shared = torch.ops.moe_dist.attend_backward(
            *(grad_BHSW.to(torch.bfloat16), query_BHSW, *shared, *others), *ctx.settings
        )
        return (own, *(_over_heads(grad, times) for grad in of_shared), *[None] * 5)


class _HalfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHQW: Tensor,
        key_BHSW: Tensor,
        value_BHSW: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
    ) -> Tensor:
        half = None if mask is None else mask.to(torch.bfloat16)
        out_BHQW, logsumexp = _flash(
            *(query_BHQW, key_BHSW, value_BHSW, 0.0, is_causal), attn_mask=half, scale=scale
        )
        # The same mask, rounded: probabilities come out of it and of logsumexp again.
        ctx.save_for_backward(query_BHQW, key_BHSW, value_BHSW, half, out_BHQW, logsumexp)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out_BHQW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHQW: Tensor) -> tuple[Tensor | None, ...]:
        query_BHQW, *shared, half, out_BHQW, logsumexp = ctx.saved_tensors
        times = query_BHQW.shape[1] // shared[0].shape[1]
        grads = _flash_backward(
            *(grad_BHQW.float(), query_BHQW.float()),
            *(_for_each_head(tensor.float(), times) for tensor in shared),
            *(out_BHQW.float(), logsumexp, 0.0, ctx.is_causal),
            attn_mask=None if half is None else half.float(),
            scale=ctx.scale,
        )
        own, *of_shared = grads
        summed = (own, *(_over_heads(grad, times) for grad in of_shared))
        return (*(grad.to(torch.bfloat16) for grad in summed), None, None, None)


def _for_each_head(shared: Tensor, times: int) -> Tensor:
    """Give what several heads share to each of them."""
    return shared if times == 1 else shared.repeat_interleave(times, dim=1)


def _over_heads(grad: Tensor, times: int) -> Tensor:
    """Add up the gradients of what several heads share."""
    return grad if times == 1 else grad.unflatten(1, (-1, times)).sum(dim=2)
