"""Makes transformers' Auto classes find the converted models, at no cost until they are used.

Importing transformers' Auto modules takes seconds, and importing a configuration class from
within them is circular. So rows of names go into the tables that these modules keep, as their
own models have them: at once where they are imported already, else when they are. A row's classes
are looked up in ``transformers.models.moe_bert`` and the like, which are made here, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from moe_dist.conversion.family_rows import FAMILIES

_MODELS_PACKAGE = "transformers.models"


def register() -> None:
    """Register all converted classes with the Auto classes, now or when they are imported."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, add_rows in _ADDITIONS.items():
        if name in sys.modules:
            add_rows(sys.modules[name])


class _Finder(MetaPathFinder):
    """Finds the modules behind our rows, and adds the rows to the modules with the tables."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{_MODELS_PACKAGE}.moe_"):
            folder = fullname.removeprefix(f"{_MODELS_PACKAGE}.moe_")
            known = any(spec.folder == folder for spec in FAMILIES.values())
            return ModuleSpec(fullname, _ClassesLoader()) if known else None
        if fullname not in _ADDITIONS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_add_rows(module: ModuleType) -> None:
            execute(module)
            _ADDITIONS[fullname](module)

        spec.loader.exec_module = execute_and_add_rows  # type: ignore[method-assign]
        return spec


class _ClassesLoader(Loader):
    """Makes a module whose classes are ours, built when first asked for."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = _converted_class  # type: ignore[method-assign]


def _converted_class(name: str) -> Any:
    home = "configurations" if name.endswith("Config") else "modeling"
    return getattr(import_module(f"moe_dist.conversion.{home}"), name)


def _add_config_rows(auto: ModuleType) -> None:
    for model_type, spec in FAMILIES.items():
        auto.CONFIG_MAPPING_NAMES[f"moe_{model_type}"] = f"Moe{spec.config_class}"


def _add_model_rows(auto: ModuleType) -> None:
    for model_type, spec in FAMILIES.items():
        for dense_name, auto_names in spec.heads.items():
            for auto_name in auto_names:
                mapping = getattr(auto, auto_name)._model_mapping
                mapping._model_mapping[f"moe_{model_type}"] = f"Moe{dense_name}"
                mapping._reverse_config_mapping[f"Moe{spec.config_class}"] = f"moe_{model_type}"


_ADDITIONS: dict[str, Callable[[ModuleType], None]] = {
    f"{_MODELS_PACKAGE}.auto.configuration_auto": _add_config_rows,
    f"{_MODELS_PACKAGE}.auto.modeling_auto": _add_model_rows,
}
