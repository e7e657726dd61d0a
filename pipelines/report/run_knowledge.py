"""What the run of a model says of it: quality, data, recipe, cost, licence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from moe_dist.errors import MissingInputError

from ..chain.stage_recovery import FINISHED, stage_of

REPORT, RECIPE = "report.json", "recipe.yaml"
_NAMES = {"finetune-teacher": "teacher", "distill": "student"}
"""A stage whose model stands in the report, and its name there where the stage has no label."""


class _Known(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Summary(_Known):
    """What one data set holds, in words."""

    figures: str = ""


class ReportedData(_Known):
    """The data that a run trained on and was measured by."""

    name: str | None = None
    summaries: dict[str, Summary] = {}


class Figures(_Known):
    """What a report says of one model."""

    metrics: dict[str, Any] | None = None
    flops_per_token: float | None = None
    latency_low_ms: dict[str, float] | None = None


class KnownReport(_Known):
    """What is read of a run's report."""

    name: str | None = None
    data: ReportedData | None = None
    metric_titles: dict[str, str] | None = None
    seq_len: int | None = None
    num_threads: int | None = None


class RecipeModel(_Known):
    """The start model, as a recipe names it."""

    teacher: str | None = None


class RecipeData(_Known):
    """The data, as a recipe names it."""

    name: str | None = None


class KnownRecipe(_Known):
    """What is read of a run's recipe."""

    model: RecipeModel = RecipeModel()
    data: RecipeData = RecipeData()


class _Stage(_Known):
    stage: str = ""
    label: str | None = None
    metrics: dict[str, Any] | None = None


Entries = TypeVar("Entries", bound=BaseModel)


@dataclass(frozen=True)
class RunKnowledge:
    """What the run of a model says of it; nothing where no run made it.

    Attributes:
        directory: the model's.
        report: the run's.
        recipe: the run's, with all defaults; None where there is none.
        own: what the report says of this model.
    """

    directory: Path
    report: KnownReport
    recipe: KnownRecipe | None
    own: Figures

    @property
    def start_model(self) -> str:
        """What the run started from, as its recipe says it; empty where that is not known."""
        return (self.recipe.model.teacher if self.recipe else None) or ""

    @property
    def start_name(self) -> str:
        """The same without directories, which are nobody else's business."""
        start = self.start_model
        is_path = start.startswith((".", "/", "~"))
        return Path(start).name if is_path else start


def read_run(directory: Path) -> RunKnowledge:
    """Read what lies in the directory of a model's run, and nowhere else.

    Args:
        directory: the model's. Its run is that of the stage that made it, or, of what was
            exported into a run's directory, that one.

    Returns:
        What is known.

    Raises:
        MissingInputError: if a file there cannot be read, or has other entries than a run's.
    """
    directory = directory.absolute()
    stage = stage_of(directory / "model.safetensors")
    run = directory.parent if stage is None else stage.parent
    if stage is None and not any(run.glob(f"*/{FINISHED}")):
        return RunKnowledge(directory, KnownReport(), None, Figures())
    report = _read(run / REPORT, json.loads, KnownReport) or KnownReport()
    recipe = _read(run / RECIPE, yaml.safe_load, KnownRecipe)
    return RunKnowledge(directory, report, recipe, _figures(stage, run / REPORT, report))


def start_licence(known: RunKnowledge) -> list[str]:
    """Names of the start model's licences, where the package or its directory's card says them."""
    from moe_dist.data.packages import MODEL_PACKAGES, MODEL_PREFIX

    start = known.start_model
    if start.startswith(MODEL_PREFIX):
        package = MODEL_PACKAGES.get(start.removeprefix(MODEL_PREFIX))
        return [package.licence] if package and package.licence else []
    if not Path(start).is_absolute():
        return []
    try:
        _, front, _ = (Path(start) / "README.md").read_text(encoding="utf-8").split("---", 2)
        said = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found = said.get("license") if isinstance(said, Mapping) else None
    names = found if isinstance(found, list) else [found]
    return [name for name in names if isinstance(name, str) and name]


def data_licence(known: RunKnowledge) -> str:
    """Licence of a data package; empty of other data."""
    from moe_dist.data.packages import DATA_PACKAGES

    name = known.recipe.data.name if known.recipe else None
    data = DATA_PACKAGES.get(name or "")
    return data.package.licence if data else ""


def _figures(stage: Path | None, path: Path, report: KnownReport) -> Figures:
    """What a run's report says of the model of a stage; nothing of one that it does not measure."""
    if stage is None:
        return Figures()
    done = _read(stage / FINISHED, json.loads, _Stage) or _Stage()
    usual = _NAMES.get(done.stage)
    reported = (report.model_extra or {}).get(done.label or usual or "") if usual else None
    if reported:
        return _checked(reported, path, Figures)
    return Figures(metrics=done.metrics)


def _read(path: Path, parse: Callable[[str], Any], kind: type[Entries]) -> Entries | None:
    """Read entries by name; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from error
    if not isinstance(found, Mapping):
        raise _damaged(path, "it holds no entries by name")
    return _checked(found, path, kind)


def _checked(found: Any, path: Path, kind: type[Entries]) -> Entries:
    try:
        return kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "it"
        raise _damaged(path, f"{where}: {first['msg']}") from error


def _damaged(path: Path, why: str) -> MissingInputError:
    return MissingInputError(
        f"{path}, which the model card is made of, cannot be read: {why}",
        remedy="mend it, or move it away: the card then says that it is not known",
    )
