"""What is common to models whose blocks become one native object: how they are read and held.

Shapes: B texts, L tokens of each, T all tokens, D model, E experts, K of them for a token,
F neurons.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.conversion.family_rows import FamilySpec
from moe_dist.errors import ConversionError
from moe_dist.inference.backends.answers_only import AnswersOnly
from moe_dist.inference.backends.routed_ffn import native_activation
from moe_dist.moe.experts import Experts
from moe_dist.moe.gates import TokenGate
from moe_dist.moe.hash_router import HashRouter, TableRouter
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import Routing, current_context
from moe_dist.moe.task_routers import TaskGate, TaskTable

PRECISIONS = {"fp32": 0, "bf16": 1, "int8": 2}
"""Numbers that the C++ code knows them by."""


_BLIND_ROUTERS = (HashRouter, TaskTable, TaskGate)
"""What chooses without hidden states, so that all layers are asked before the first."""


class NativeBlocks(AnswersOnly):
    """In the place of all blocks of a stack, as one.

    Args:
        routers: of the layers; None where a layer routes nothing.
        gates: classes of routers that the native code has itself.

    Attributes:
        is_one_call: whether no router is called between the layers.
    """

    def __init__(
        self, routers: list[nn.Module | None], *, gates: tuple[type[TokenGate], ...]
    ) -> None:
        super().__init__()
        self.routers = nn.ModuleList(nn.Identity() if r is None else r for r in routers)
        known = (*gates, *_BLIND_ROUTERS)
        self.is_one_call = all(router is None or type(router) in known for router in routers)
        self._tables_LNK = _joined_tables(routers)

    def chosen_before(self, hidden_BLD: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Ask the routers that read no hidden states: each layer's experts, and their weights.

        Both are empty where there are no such routers.
        """
        if self._tables_LNK is not None:
            return self._looked_up(self._tables_LNK, hidden_BLD)
        if not any(isinstance(router, _BLIND_ROUTERS) for router in self.routers):
            return [], []
        pairs = [
            choice(router, hidden_BLD) if isinstance(router, _BLIND_ROUTERS) else (None, None)
            for router in self.routers
        ]
        return [ids for ids, _ in pairs], [weights for _, weights in pairs]

    def _looked_up(
        self, tables_LNK: Tensor, hidden_BLD: Tensor
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Do the same for all layers at once; all rows have the same weight."""
        router = cast(TableRouter, self.routers[0])
        rows_T = router.rows(hidden_BLD.flatten(0, 1), current_context())
        ids_LTK = tables_LNK.index_select(1, rows_T)
        number, _, top_k = ids_LTK.shape
        weights_TK = None
        if top_k > 1:
            weights_TK = torch.full_like(ids_LTK[0], 1 / top_k, dtype=torch.float32)
        return list(ids_LTK.unbind()), [weights_TK] * number


def _joined_tables(routers: list[nn.Module | None]) -> Tensor | None:
    """Join the tables of all layers, if all are read alike: (layers, N, K); they become views."""
    alike = [router for router in routers if isinstance(router, TableRouter)]
    kinds = {(type(router), router.table.shape) for router in alike}
    if len(alike) < len(routers) or len(kinds) > 1:
        return None
    joined = torch.stack([router.table for router in alike])
    for router, table in zip(alike, joined, strict=True):
        router.table = table
    return joined.view(*joined.shape[:2], -1)


def choice(router: nn.Module, hidden_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
    """Ask a router: (T, K) experts of the tokens, and their weights, or None where all are 1."""
    routing: Routing = router(hidden_BLD.reshape(-1, hidden_BLD.shape[-1]), current_context())
    return routing.expert_ids, None if routing.unit_weights else routing.expert_weights


@dataclass(frozen=True)
class NativeGate:
    """What native code needs of a router that is a gate.

    Attributes:
        weight: (E, D); None where another router chooses, or nobody.
        top_k: experts of a token.
        weighs: whether experts count by their scores; else the one that is chosen counts whole.
    """

    weight: Tensor | None = None
    top_k: int = 1
    weighs: bool = False

    @classmethod
    def of(cls, router: nn.Module | None, gates: tuple[type[TokenGate], ...]) -> NativeGate:
        """Read a router, if it is one of these classes."""
        if router is None or type(router) not in gates:
            return cls()
        gate = cast(TokenGate, router)
        weighs = gate.top_k > 1 or gate.gate_scale != "straight_through"
        return cls(gate.gate.weight, gate.top_k, weighs)


class UnsuitedError(Exception):
    """Why a model keeps its own blocks."""


@dataclass(frozen=True)
class Network:
    """A feed-forward network, or one expert of it.

    Attributes:
        w_in: (F, D).
        b_in: (F,).
        w_out: (D, F).
        b_out: (D,).
        w_gate: (F, D) where it is gated.
        b_gate: (F,).
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None
    w_gate: Tensor | None = None
    b_gate: Tensor | None = None

    def rounded(self) -> Network:
        """Fill up with neurons that give nothing: products read four inputs at once."""
        missing = -self.w_in.shape[0] % 4
        rows: dict[str, Tensor | None] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            of_neurons = field.name != "b_out" and value is not None
            by_columns = value is self.w_out or (of_neurons and value.dim() == 1)
            sides = (0, missing) if by_columns else (0, 0, 0, missing)
            rows[field.name] = F.pad(value, sides) if of_neurons else value
        return Network(**rows)  # type: ignore[arg-type]


@dataclass(frozen=True)
class FeedForward:
    """What stands in a block as its feed-forward network.

    Attributes:
        experts: one where it is dense.
        shared: one network that all tokens use, or none.
        router: chooses among experts, if there are several.
        activation: its number in C++.
    """

    experts: list[Network]
    shared: list[Network]
    router: nn.Module | None
    activation: int

    @property
    def networks(self) -> list[Network]:
        """All of them, shared neurons last."""
        return [*self.experts, *self.shared]


def copy_sharing_weights(model: Any) -> Any:
    """Copy a model, but not the weights, most of which are packed and then left out."""
    shared = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, shared)


def lists_of_blocks(model: nn.Module, family: FamilySpec) -> list[nn.ModuleList]:
    """Find where a model keeps its blocks."""
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(type(block).__name__ in family.blocks for block in module)
    ]


def check_is_its_own(block: nn.Module) -> None:
    """See that a block is as its family has it, without hooks; else it is unsuited."""
    for module in block.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # Transformers leaves its own where hidden states were once asked for.
        own = [hook for hook in hooks if "output_capturing_hook" not in _name(hook)]
        if own or "forward" in vars(module):
            raise UnsuitedError("a block has hooks, or a forward of its own")
        if not is_known_class(module):
            raise UnsuitedError(
                f"a block holds a {type(module).__name__}, which is not its family's"
            )


def is_known_class(module: nn.Module) -> bool:
    """Whether what a module does is known: torch, transformers or this tool have its class."""
    return type(module).__module__.partition(".")[0] in ("torch", "transformers", "moe_dist")


def check_attention(config: Any) -> None:
    """See that attention is computed as native code does."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise UnsuitedError(f"its attention is {config._attn_implementation!r}")


def read_linear(block: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a plain linear layer; widths are to be multiples of 4."""
    linear: Any = block.get_submodule(path)
    if type(linear) is not nn.Linear:
        raise UnsuitedError(f"{path} is no plain linear layer")
    return linear.weight, linear.bias


def check_widths(weights: list[Tensor]) -> None:
    """See that products can read what these layers read."""
    widths = sorted({weight_OI.shape[1] for weight_OI in weights})
    if any(width % 4 for width in widths):
        raise UnsuitedError(f"widths of {', '.join(map(str, widths))} are no multiples of 4")


def read_feed_forward(block: nn.Module, family: FamilySpec, *, is_gated: bool) -> FeedForward:
    """Read a block's network, dense or routed."""
    layer = next((module for module in block.modules() if isinstance(module, MoELayer)), None)
    if layer is None:
        gate = read_linear(block, family.gate) if is_gated and family.gate else (None, None)
        dense = Network(
            *read_linear(block, family.linear_in), *read_linear(block, family.linear_out), *gate
        )
        activation: Any = block.get_submodule(family.activation)
        experts, shared, router = [dense.rounded()], [], None
    else:
        activation, router = layer.experts.activation, layer.router
        experts = _networks(layer.experts, is_gated=is_gated)
        shared = [] if layer.shared is None else _networks(layer.shared, is_gated=is_gated)
    number = native_activation(activation)
    if number is None:
        raise UnsuitedError("its activation is not known there")
    return FeedForward(experts, shared, router, number)


def refuse_what_is_not_kept(base: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Refuse to give what lies between native layers; a hook before a stack's forward."""
    config: Any = base.config
    for name in ("output_hidden_states", "output_attentions"):
        asked = kwargs.get(name)
        if getattr(config, name, False) if asked is None else asked:
            raise ConversionError(
                f"a model in its lean form does not keep what {name} asks for",
                remedy="use an eager form",
            )


def _networks(experts: Experts, *, is_gated: bool) -> list[Network]:
    if experts.w_in is None or experts.w_out is None:
        raise UnsuitedError("its experts have no neurons")
    if (experts.w_gate is not None) != is_gated:
        raise UnsuitedError(
            "its experts are gated, and its family's networks are not, or not gated"
        )
    names = ("w_in", "b_in", "w_out", "b_out", "w_gate", "b_gate")
    stacks = [getattr(experts, name) for name in names]
    none = [None] * experts.num_experts
    parts = zip(*(none if stack is None else stack for stack in stacks), strict=True)
    return [Network(*part).rounded() for part in parts]


def _name(hook: object) -> str:
    return str(getattr(hook, "__qualname__", ""))
