"""Configuration classes of the converted models: the dense ones with a `moe` entry.

In config.json the entries that name the activation hold `REFUSAL` instead, so that a dense
class which is handed the directory stops with that text, and never loads half of a model.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from transformers import PretrainedConfig

from moe_dist.conversion.families import FAMILIES

REFUSAL = "moe-dist experts - load with moe_dist.inference.load_model, or import moe_dist first"
_ACTIVATION = "activation"


class MoeConfig(PretrainedConfig):
    """What all families add to their dense configuration."""

    moe: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Put the activation's name back before the dense class reads it.

        Args:
            **kwargs: entries that are not fields.
        """
        for key, value in (self.moe or {}).get(_ACTIVATION, {}).items():
            if kwargs.get(key) == REFUSAL:
                kwargs[key] = value
            if getattr(self, key, None) == REFUSAL:
                setattr(self, key, value)
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Give what config.json holds, with the activation where only these classes find it."""
        values: dict[str, Any] = super().to_dict()
        if values.get("moe"):
            keys = FAMILIES[self.model_type.removeprefix("moe_")].activation_keys
            activation = {key: values[key] for key in keys if key in values}
            values["moe"] = values["moe"] | {_ACTIVATION: activation}
            values.update(dict.fromkeys(activation, REFUSAL))
        return values


@functools.cache
def config_class(model_type: str) -> type[MoeConfig]:
    """Build the class of a family's converted models, of model_type ``moe_<model_type>``."""
    spec = FAMILIES[model_type]
    dense = getattr(importlib.import_module(spec.module("configuration")), spec.config_class)
    name = f"Moe{spec.config_class}"
    namespace = {
        "__doc__": f"Configuration of a {dense.__name__} model with experts in its FFNs.",
        "__module__": __name__,
        "__qualname__": name,
        "model_type": f"moe_{model_type}",
    }
    return type(name, (MoeConfig, dense), namespace)


def __getattr__(name: str) -> Any:
    # Makes the classes importable by name, which pickling needs.
    for model_type, spec in FAMILIES.items():
        if name == f"Moe{spec.config_class}":
            return config_class(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
