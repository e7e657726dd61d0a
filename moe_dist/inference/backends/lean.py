"""What a model needs to answer on a CPU, and no more.

Weights lie as the processor wants them, a routed feed-forward network is one call, and nothing is
recorded. The rest is the architecture's own code, so every family has this form.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from moe_dist.conversion.families import known_family
from moe_dist.errors import ConversionError
from moe_dist.inference.backends.answers_only import refuse_as_a_whole
from moe_dist.inference.backends.decoder import LLAMA_KIND, install_native_decoder
from moe_dist.inference.backends.eager import DTYPES, cast_weights
from moe_dist.inference.backends.encoder import BLOCKS, install_native_encoder
from moe_dist.inference.backends.native import load_decoder, load_operators
from moe_dist.inference.backends.native_blocks import (
    PRECISIONS,
    NativeBlocks,
    UnsuitedError,
    copy_sharing_weights,
)
from moe_dist.inference.backends.native_linear import NativeLinear
from moe_dist.inference.backends.packed_linear import PackedLinear
from moe_dist.inference.backends.routed_ffn import RoutedFFN, reads_hidden_states_only
from moe_dist.inference.merged_experts import refuse_merged_experts
from moe_dist.moe.dispatch import LocalDispatcher
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routing import remove_routing_hooks

log = logging.getLogger(__name__)


class Lean:
    """Packed weights, one call for each routed network; cannot learn or be saved."""

    precisions = tuple(PRECISIONS)
    is_quick = True

    def prepare(self, model: Any, precision: str) -> Any:
        """Copy the model and replace its layers; a ConversionError where one has no such form."""
        dtype = DTYPES.get(precision, torch.float32)
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        _refuse(model)
        if any(layer.router is not None for layer in layers):
            load_operators()
        lean = copy_sharing_weights(model)
        obstacle = _install_native_blocks(lean, precision)
        if obstacle and precision not in DTYPES:
            raise ConversionError(
                f"there is no lean form of this model in {precision}: {obstacle}",
                remedy="use lean-bf16, or onnx-int8",
            )
        if obstacle:
            log.info("blocks keep the architecture's own code: %s", obstacle)
        _replace(lean, dtype)
        lean.eval()
        own = [m for m in lean.modules() if isinstance(m, RoutedFFN | NativeBlocks | NativeLinear)]
        cast_weights(lean, dtype, apart=nn.ModuleList(own))
        _own_weights(lean, model)
        if all(reads_hidden_states_only(layer.router) for layer in layers):
            for module in lean.modules():
                remove_routing_hooks(module)
        refuse_as_a_whole(lean)
        return lean


def _own_weights(lean: nn.Module, model: nn.Module) -> None:
    """Copy what is still the model's own."""
    theirs = {weight.data_ptr() for weight in model.parameters()}
    for weight in lean.parameters():
        if weight.numel() and weight.data_ptr() in theirs:
            weight.data = weight.data.clone()


def _install_native_blocks(model: Any, precision: str) -> str:
    """Put one native object in the place of all blocks, if that can be; else say why not."""
    family = known_family(model)
    installers = dict.fromkeys(BLOCKS, install_native_encoder)
    installers |= dict.fromkeys(LLAMA_KIND, install_native_decoder)
    if family is None or family.model_type not in installers:
        return f"only {', '.join(installers)} have it"
    load = load_decoder if family.model_type in LLAMA_KIND else load_operators
    if not load() or not torch.ops.moe_dist.multiplies(PRECISIONS[precision]):
        return f"there is no native product in {precision} here"
    try:
        installers[family.model_type](model, family, precision)
    except UnsuitedError as reason:
        return str(reason)
    return ""


def _refuse(model: nn.Module) -> None:
    refuse_merged_experts(model, "lean")
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConversionError(
            f"the lean form is for a CPU, and the model is on {device}",
            remedy="load it with device='cpu', or use the eager form",
        )
    for name, module in model.named_modules():
        if _is_replaced(module) and _has_more_than_weights(module):
            raise ConversionError(
                f"{name} has hooks, a forward or a dispatcher of its own, which the lean form of "
                "its layer would leave out",
                remedy="take them off, or use the eager form",
            )


def _is_replaced(module: nn.Module) -> bool:
    is_linear = type(module) is nn.Linear or type(module).__name__ == "Conv1D"
    return is_linear or isinstance(module, MoELayer)


def _has_more_than_weights(module: nn.Module) -> bool:
    has_hooks = bool(module._forward_hooks or module._forward_pre_hooks)
    dispatches = isinstance(module, MoELayer) and type(module.dispatcher) is not LocalDispatcher
    return has_hooks or "forward" in vars(module) or dispatches


def _replace(parent: nn.Module, dtype: torch.dtype) -> None:
    for name, child in list(parent.named_children()):
        if isinstance(child, NativeBlocks):
            continue
        if not _is_replaced(child):
            _replace(child, dtype)
        elif isinstance(child, MoELayer):
            setattr(parent, name, RoutedFFN(child, dtype))
        else:
            linear: Any = child
            # Conv1D has its weight the other way round.
            weight_OI = linear.weight if type(child) is nn.Linear else linear.weight.t()
            setattr(parent, name, PackedLinear(weight_OI, linear.bias, dtype))
