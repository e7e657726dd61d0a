"""Random numbers of a sample's own: whatever batch, rank or padding it meets, it draws the same.

A number is a hash of seed, sample, place of the token in its sample, layer and column, and not the
next one of a generator, whose order would depend on what else is in the batch.

Shapes: B batch, S sequence, N rows (a token's or a whole sample's), C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from moe_dist.moe.on_device import bring
from moe_dist.moe.routing import RoutingContext

# Odd constants of SplitMix64 and of xxHash, as signed 64-bit integers.
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def uniform_rows(
    shape: Sequence[int],
    context: RoutingContext | None,
    *,
    salt: int,
    device: torch.device,
) -> Tensor:
    """Draw numbers evenly between 0 and 1.

    Args:
        shape: N, either one row for each token of the forward call or one for each sample, and C.
        context: numbers the samples. Where it does not, its rows are numbered as they come, and
            where it has no seed, torch's generator gives one.
        salt: of the layer and the use; another one draws other numbers.
        device: where to draw.

    Returns:
        (N, C) float64, above 0 and below 1.
    """
    num_rows, num_columns = shape
    context = context or RoutingContext()
    seed = context.noise_seed
    if seed is None:
        # On the CPU, whose generator recomputation sets back, without a device sync.
        seed = int(torch.randint(1 << 62, (), device="cpu"))
    keys_N = _row_keys(num_rows, context, device) ^ _signed(seed + salt * 0x9E3779B97F4A7C15)
    columns_C = torch.arange(1, num_columns + 1, device=device) * _STEP
    bits_NC = _mixed(_mixed(keys_N).unsqueeze(1) + columns_C)
    # The upper 52 bits, and a half so that 0 and 1 stay out.
    return (_shifted(bits_NC, 12).double() + 0.5) * 2.0**-52


def normal_rows(
    shape: Sequence[int],
    context: RoutingContext | None,
    *,
    salt: int,
    device: torch.device,
) -> Tensor:
    """Draw (N, C) float64 from the standard normal distribution; arguments as `uniform_rows`."""
    uniform_NC = uniform_rows(shape, context, salt=salt, device=device)
    return cast(Tensor, torch.special.ndtri(uniform_NC))


def _row_keys(num_rows: int, context: RoutingContext, device: torch.device) -> Tensor:
    """Number each row by its sample and, where rows are tokens, by its place in the sample."""
    inputs = context.mask if context.mask is not None else context.token_ids
    samples_B = context.sample_ids
    if samples_B is None:
        num_samples = num_rows if inputs is None or inputs.dim() != 2 else len(inputs)
        samples_B = torch.arange(num_samples, device="cpu")
    keys_B = _mixed(bring(samples_B, device) + 1)
    length = num_rows // max(1, len(keys_B))
    if length * len(keys_B) != num_rows:
        keys_B, length = _mixed(torch.arange(1, num_rows + 1, device=device)), 1
    # A row of a whole sample has the place of a first token.
    places_BS = torch.arange(1, length + 1, device=device).expand(len(keys_B), length)
    if context.mask is not None and context.mask.shape == places_BS.shape:
        places_BS = bring(context.mask, device).cumsum(1)
    return _mixed(keys_B.unsqueeze(1) + places_BS * _STEP).reshape(-1)


def _mixed(keys: Tensor) -> Tensor:
    """SplitMix64's finaliser: every bit of the key changes half of the result."""
    keys = (keys ^ _shifted(keys, 30)) * _MIX_1
    keys = (keys ^ _shifted(keys, 27)) * _MIX_2
    return keys ^ _shifted(keys, 31)


def _shifted(bits: Tensor, by: int) -> Tensor:
    # Torch shifts the sign bit in; an unsigned shift brings zeros.
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _signed(number: int) -> int:
    number %= 1 << 64
    return number - (1 << 64) if number >> 63 else number
