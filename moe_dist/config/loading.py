"""From a recipe file to a RunConfig, or to the list of everything that is wrong with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from moe_dist.config.checks import find_cross_faults
from moe_dist.config.data_section import TaskDataConfig
from moe_dist.config.faults import check_keys
from moe_dist.config.override_texts import parse_overrides
from moe_dist.config.overrides import apply_overrides
from moe_dist.config.run_config import (
    BUILT_IN_COMPARISONS,
    COMPARABLE_SECTIONS,
    RunConfig,
    merge_comparison,
)
from moe_dist.config.search_checks import find_search_faults
from moe_dist.config.sections import NAME_PATTERN
from moe_dist.config.yaml_values import describe_yaml_error, parse_yaml
from moe_dist.errors import ConfigError
from moe_dist.uris import absolute_sqlite, is_uri

AnyData = TypeVar("AnyData", bound=TaskDataConfig)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe, apply overrides, and check everything before anything starts.

    Args:
        path: the YAML recipe.
        overrides: texts such as `moe.top_k=2`; the values are YAML.

    Returns:
        The checked settings, with absolute paths.

    Raises:
        ConfigError: with every fault of the recipe and the overrides, each with its remedy.
    """
    return build_config(read_settings(path, overrides), source=str(path))


def read_settings(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read a recipe and apply overrides such as `moe.top_k=2`, without checking the values.

    Plain values as they were given: paths may be relative, defaults are missing. What is no YAML is
    a ConfigError.
    """
    raw = _read_recipe(Path(path))
    for section, value in list(raw.items()):
        if value is None:  # `finetune:` with nothing below it
            del raw[section]
    apply_overrides(raw, parse_overrides(overrides))
    return raw


def build_config(raw: Mapping[str, Any], source: str = "configuration") -> RunConfig:
    """Check settings in memory; a ConfigError has every fault, each with its remedy.

    `source` is what an error calls them; paths in the result are absolute.
    """
    config, faults, faulty = check_keys(raw)
    faults += find_cross_faults(config, faulty)
    faults += _comparison_faults(config, frozenset(faults), faulty)
    faults += _search_faults(config, frozenset(faults), faulty)
    if faults:
        raise ConfigError(faults, source=source)
    return _resolve(config)


def _read_recipe(recipe: Path) -> dict[str, Any]:
    source = str(recipe)
    try:
        raw = parse_yaml(recipe.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(["the recipe does not exist; check the path."], source=source) from None
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is not UTF-8; save the recipe as UTF-8."
        raise ConfigError([fault], source=source) from None
    except OSError as error:
        fault = f"the recipe cannot be read ({error.strerror}); give a YAML file."
        raise ConfigError([fault], source=source) from None
    except yaml.YAMLError as error:
        fault = f"not valid YAML, {describe_yaml_error(error)}; correct that line."
        raise ConfigError([fault], source=source) from None
    if raw is None:
        raise ConfigError(
            ["the recipe is empty; start from one in pipelines/recipes."], source=source
        )
    if not isinstance(raw, dict):
        raise ConfigError(["the recipe is not a mapping; write `key: value` lines."], source=source)
    return {str(key): value for key, value in raw.items()}


def _comparison_faults(
    config: RunConfig, known: frozenset[str], faulty_in_main: frozenset[str]
) -> list[str]:
    faults = []
    for label, changes in config.compare.items():
        path = f"compare.{label}"
        if not re.fullmatch(NAME_PATTERN, label):
            faults.append(
                f"{path} cannot name a directory; use letters, digits, dots, dashes, underscores."
            )
        if not changes and label not in BUILT_IN_COMPARISONS:
            faults.append(
                f"{path} changes nothing and is not built in; give it overrides, such as {{{label}:"
                f" {{moe.router: token_gate}}}}, or use {', '.join(BUILT_IN_COMPARISONS)}."
            )
        outside = [key for key in changes if str(key).split(".")[0] not in COMPARABLE_SECTIONS]
        faults += [
            f"{path}.{key} cannot differ, since all students share the teacher and its data; "
            f"change only {', '.join(COMPARABLE_SECTIONS)} in a comparison."
            for key in outside
        ]
        if not outside:
            other, own_faults, faulty = check_keys(merge_comparison(config, label))
            # What is wrong with the main run and its teacher has been said.
            own_faults += find_cross_faults(other, faulty | faulty_in_main | {"finetune"})
            faults += [f"{path}: {fault}" for fault in own_faults if fault not in known]
    return faults


def _search_faults(
    config: RunConfig, known: frozenset[str], faulty_in_main: frozenset[str]
) -> list[str]:
    # What is wrong with the recipe itself has been said.
    def key_faults(raw: Mapping[str, Any]) -> list[str]:
        return [fault for fault in check_keys(raw)[1] if fault not in known]

    def cross_faults(raw: Mapping[str, Any]) -> list[str]:
        point, faults, faulty = check_keys(raw)
        faults += find_cross_faults(point, faulty | faulty_in_main)
        return [fault for fault in faults if fault not in known]

    return find_search_faults(config, key_faults, cross_faults)


def _resolve(config: RunConfig) -> RunConfig:
    """Make paths absolute, since a Ray worker has another working directory."""
    data, model = _with_absolute_files(config.data), config.model
    if data.tasks is not None:
        tasks = {name: _with_absolute_files(task) for name, task in data.tasks.items()}
        data = data.model_copy(update={"tasks": tasks})
    if not is_uri(model.teacher) and Path(model.teacher).expanduser().is_dir():
        model = model.model_copy(update={"teacher": _absolute(model.teacher)})
    uri = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    return config.model_copy(
        update={
            "output_dir": _absolute_directory(config.output_dir),
            "data": data,
            "model": model,
            "tracking": config.tracking.model_copy(update={"uri": absolute_sqlite(uri)}),
        }
    )


def _with_absolute_files(data: AnyData) -> AnyData:
    update: dict[str, Any] = {}
    if data.unlabelled is not None:
        update["unlabelled"] = tuple(map(_absolute, data.unlabelled))
    if data.source == "files":
        update |= {key: _absolute(getattr(data, key)) for key in ("train", "dev")}
    return data.model_copy(update=update)


def _absolute_directory(place: Path | str) -> Path | str:
    return place if isinstance(place, str) else Path(os.path.abspath(place.expanduser()))


def _absolute(path: str | None) -> str | None:
    if path is None or is_uri(path):
        return path
    return os.path.abspath(os.path.expanduser(path))
