"""The converted models: registered subclasses of each architecture's own classes.

``MoeBertForSequenceClassification`` and its kin are made from `FAMILIES` when first asked for.
Each builds its dense parent and puts MoE layers where the FFNs were, so forward, generate and
save_pretrained are the parent's own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from moe_dist.conversion.absent import leave_out
from moe_dist.conversion.configurations import config_class
from moe_dist.conversion.families import FAMILIES, FamilySpec
from moe_dist.conversion.heads import install_heads
from moe_dist.conversion.hidden_states import with_decoder_mask
from moe_dist.conversion.moe_slots import MoeSettings, replace_ffns
from moe_dist.errors import ConversionError
from moe_dist.moe.experts import Experts
from moe_dist.moe.routing import checkpoint_context_fn

_IN_ANOTHER: ContextVar[bool] = ContextVar("moe_dist_building_a_model", default=False)
"""Whether a model is being built whose body transformers may look up by its configuration."""


class MoeModel(PreTrainedModel):
    """What all converted models add to their dense parent."""

    def __init__(
        self, config: Any, *inputs: Any, token_counts: Tensor | None = None, **kwargs: Any
    ) -> None:
        """Build the dense architecture and replace its FFNs.

        Args:
            config: with a `moe` entry.
            *inputs: the parent's own.
            token_counts: (V,) for fresh hash_balanced tables; a checkpoint brings its own.
            **kwargs: the parent's own.

        Raises:
            ConversionError: if the configuration has no `moe` entry.
        """
        if not config.moe:
            raise ConversionError(
                f"the configuration of {type(self).__name__} has no 'moe' entry",
                remedy="make the model with dense_to_moe, or load a directory that it was saved to",
            )
        settings = MoeSettings.from_dict(config.moe)
        is_body = _IN_ANOTHER.get()
        reset = _IN_ANOTHER.set(True)
        try:
            super().__init__(config, *inputs, **kwargs)
        finally:
            _IN_ANOTHER.reset(reset)
        if is_body:
            # Llama's heads make their body by AutoModel, so that it is one of ours: left dense,
            # since layers are named and numbered from the whole model.
            return
        leave_out(self, settings.absent)
        replace_ffns(self, _spec_of(config), settings, token_counts=token_counts)
        install_heads(self)
        if "decoder_attention_mask" in inspect.signature(self.forward).parameters:
            self.register_forward_pre_hook(_name_real_tokens, with_kwargs=True)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass, with the routing of the forward pass.

        `use_reentrant` True is a ConversionError: routers would find no token ids then.
        """
        given = dict(activation_checkpointing_kwargs or {})
        if given.get("use_reentrant"):
            raise ConversionError(
                "reentrant gradient checkpointing loses what the routers read",
                remedy="pass use_reentrant=False, or leave it out",
            )
        given |= {"use_reentrant": False, "context_fn": checkpoint_context_fn}
        super().activation_checkpointing_enable(given, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Experts):
            std = getattr(self.config, "initializer_range", None) or 0.02
            for name, parameter in module.named_parameters(recurse=False):
                if name.startswith("b_"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=std)
        elif not _is_emptied(module, _spec_of(self.config)):
            super()._init_weights(module)


@functools.cache
def model_class(name: str) -> type[MoeModel]:
    """Build the class of a name like MoeBertModel; a ConversionError if no family has it."""
    for model_type, spec in FAMILIES.items():
        dense_name = name.removeprefix("Moe")
        if name == f"Moe{dense_name}" and dense_name in spec.heads:
            dense = getattr(importlib.import_module(spec.module("modeling")), dense_name)
            namespace = {
                "__doc__": f"{dense_name} with experts in place of its FFNs.",
                "__module__": __name__,
                "__qualname__": name,
                "config_class": config_class(model_type),
            }
            return type(name, (MoeModel, dense), namespace)
    known = [f"Moe{head}" for spec in FAMILIES.values() for head in spec.heads]
    raise ConversionError(
        f"there is no converted class {name}", remedy=f"use one of {', '.join(known)}"
    )


def _name_real_tokens(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the routers of a decoder see its padding."""
    return args, kwargs if args else with_decoder_mask(kwargs)


def _spec_of(config: Any) -> FamilySpec:
    return FAMILIES[config.model_type.removeprefix("moe_")]


def _is_emptied(module: nn.Module, spec: FamilySpec) -> bool:
    # GPT-2 initialises its FFN's second linear layer from the module that holds it.
    return type(module).__name__ in spec.blocks and any(
        isinstance(module.get_submodule(path), nn.Identity) for path in spec.emptied
    )


def __getattr__(name: str) -> Any:
    if name.startswith("Moe"):
        try:
            return model_class(name)
        except ConversionError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
