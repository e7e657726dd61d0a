"""Where a model's forward pass spends its time, by part: embeddings, attention, experts and so on.

Parts are told apart by hooks from outside, so a model that nobody looks at pays nothing.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moe_dist.conversion.families import find_slots, is_a, known_family
from moe_dist.errors import ConversionError
from moe_dist.inference.backends.native_blocks import NativeBlocks
from moe_dist.inference.backends.routed_ffn import RoutedFFN
from moe_dist.measure.latency import wait_for
from moe_dist.moe.layer import MoELayer
from moe_dist.training.parts import part

REST = "rest"
"""Norms, residual sums, masks, and whatever the model does between its parts."""
FEED_FORWARD = "feed-forward"
_SLOT_PARTS = ("linear_in", "gate", "linear_out", "activation")


class PartTimer:
    """Adds up how long each part took by itself, what it calls left out.

    Args:
        device: of the model; a GPU is waited for where a part begins or ends.

    Attributes:
        milliseconds: by part.
        calls: by part.
    """

    def __init__(self, device: torch.device) -> None:
        self.milliseconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self._device = device
        self._stack: list[tuple[str, float, list[float], Any]] = []

    def enter(self, name: str) -> None:
        """Begin a part, perhaps inside another."""
        span = part(name)
        span.__enter__()
        self._stack.append((name, self._now_ms(), [0.0], span))

    def leave(self) -> None:
        """End the part that was begun last."""
        name, begin_ms, inside, span = self._stack.pop()
        passed_ms = self._now_ms() - begin_ms
        span.__exit__(None, None, None)
        self.milliseconds[name] += passed_ms - inside[0]
        self.calls[name] += 1
        if self._stack:
            self._stack[-1][2][0] += passed_ms

    def _now_ms(self) -> float:
        wait_for(self._device)
        return time.perf_counter() * 1e3


@contextmanager
def timed_parts(model: nn.Module) -> Iterator[PartTimer]:
    """Time a model's parts while the block lasts; hooks are taken off with it."""
    timer = PartTimer(next(model.parameters()).device)
    handles = []

    def watch(module: nn.Module, name: str) -> None:
        def before(*_: Any) -> None:
            timer.enter(name)

        def after(*_: Any) -> None:
            timer.leave()

        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))

    try:
        for module, name in [(model, REST), *find_parts(model)]:
            watch(module, name)
        yield timer
    finally:
        for handle in handles:
            handle.remove()


def find_parts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """List the modules of a model whose time tells something, with the part that each belongs to.

    Where one is inside another (a router in its layer), the outer one's time is what is left.
    """
    dense = {id(module) for module in _dense_feed_forward(model)}
    found: dict[int, tuple[nn.Module, str]] = {}
    prefix = str(getattr(model, "base_model_prefix", ""))

    def walk(module: nn.Module, name: str, depth: int) -> None:
        parts = list(_parts_of(module, name, id(module) in dense))
        if not parts and depth == 1 and name != prefix and _is_head(module):
            parts = [(module, "head")]
        if parts:
            # A module may stand in two places, such as tied embeddings.
            found.update({id(one): (one, label) for one, label in parts})
            return
        for own, child in module.named_children():
            walk(child, own, depth + 1)

    for own, child in model.named_children():
        walk(child, own, 1)
    return list(found.values())


def self_times(ranges: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """Add up what each range took by itself, the ranges inside of it left out.

    Args:
        ranges: name, begin and end, of one thread; nested or apart.

    Returns:
        Time by name, in the unit of the ranges.
    """
    times: dict[str, float] = defaultdict(float)
    open_ranges: list[tuple[str, float]] = []
    for name, begin, end in sorted(ranges, key=lambda one: (one[1], -one[2])):
        while open_ranges and open_ranges[-1][1] <= begin:
            open_ranges.pop()
        if open_ranges:
            times[open_ranges[-1][0]] -= end - begin
        times[name] += end - begin
        open_ranges.append((name, end))
    return dict(times)


def _parts_of(module: nn.Module, name: str, is_dense_ffn: bool) -> Iterator[tuple[nn.Module, str]]:
    lower = name.lower()
    if isinstance(module, NativeBlocks):
        routers = [one for one in module.routers if not isinstance(one, nn.Identity)]
        if not routers:
            yield module, "attention and feed-forward"
        elif module.is_one_call:
            yield module, "attention, router and experts"
        else:
            yield module, "attention and experts"
            yield from ((one, "router") for one in routers)
    elif isinstance(module, RoutedFFN):
        has_router = module.router is not None
        yield module, "dispatch and experts" if has_router else FEED_FORWARD
        if isinstance(module.router, nn.Module):
            yield module.router, "router"
    elif isinstance(module, MoELayer) and module.router is None:
        yield module, FEED_FORWARD
    elif isinstance(module, MoELayer):
        yield module, "merging and experts" if module.merges else "dispatch"
        yield module.experts, "experts"
        yield from ((one, label) for one, label in _beside(module) if one is not None)
    elif is_dense_ffn:
        yield module, FEED_FORWARD
    elif isinstance(module, nn.Embedding) or type(module).__name__.endswith("Embeddings"):
        yield module, "embeddings"
    elif ("attn" in lower or "attention" in lower) and "norm" not in lower:
        yield module, "attention"
    elif lower == "pooler":
        yield module, "head"


def _beside(layer: MoELayer) -> tuple[tuple[nn.Module | None, str], ...]:
    return (layer.router, "router"), (layer.shared, "experts")


def _dense_feed_forward(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of dense feed-forward networks, in a family that is known."""
    spec = known_family(model)
    if spec is None:
        return
    try:
        slots = find_slots(model, spec)
    except ConversionError:
        return
    for slot in slots:
        for which in _SLOT_PARTS:
            try:
                own = getattr(slot, which)
            except AttributeError:
                # A layer that became experts, or an activation that is a function.
                continue
            if isinstance(own, nn.Module) and not isinstance(own, nn.Identity | MoELayer):
                yield own


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _is_head(module: nn.Module) -> bool:
    """Whether something beside the base model makes answers of hidden states: no stack, no norm."""
    if _is_norm(module) or is_a(module, ("Dropout", "ModuleList")):
        return False
    names = (name.lower() for name, _ in module.named_modules())
    return not any("attn" in name or "attention" in name for name in names)
