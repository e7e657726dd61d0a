"""compact: fuse, compress and repair a trained student, and say what that costs in quality."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.table import Table

from moe_dist.config.data_section import TaskDataConfig
from moe_dist.data.retention import ratio, why_no_ratio
from moe_dist.errors import MissingInputError, MoeDistError
from moe_dist.whole_files import write_json

from ..console import UNDEFINED, quantity
from .compact_settings import CompactSettings
from .compaction_checks import check_compaction

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..console import Console

RESULT = "compact.json"
FUSED, UNPRUNED, COMPRESSED, MODEL = "fused", "unpruned", "compressed", "model"
MANY_EPOCHS = 10_000
RECIPE_NAME = "recipe.yaml"
Data = TypeVar("Data", bound=TaskDataConfig)


def find_recipe(directory: Path, purpose: str = "compacting needs data") -> Path:
    """Find the resolved recipe that a student was made with, or raise MissingInputError."""
    for parent in directory.absolute().parents:
        if (parent / RECIPE_NAME).is_file():
            return parent / RECIPE_NAME
    raise MissingInputError(
        f"no {RECIPE_NAME} lies above {directory}, and {purpose}",
        remedy="give a recipe with --recipe",
    )


def compact(settings: CompactSettings, config: RunConfig, console: Console) -> dict[str, Any]:
    """Fuse, compress and repair; results go to `settings.output`.

    Experts are joined first where there are to be fewer; then each keeps its most important
    neurons where it is to be smaller. The repair is a distillation from the student as it was, or
    from `settings.teacher`, with the recipe's losses and learning rate, in this process.

    Args:
        settings: what to make.
        config: the recipe that says data, losses and training.
        console: where progress is shown.

    Returns:
        What `compact.json` holds: `metrics`, `parameters` and `retention` for each of `before`,
        `fused` (where something was), `compressed` and `repaired` (where it was asked for).

    Raises:
        MoeDistError: if the output holds files of others, or the student cannot be compacted.
    """
    from moe_dist.inference import load_model, load_tokenizer, save_model
    from moe_dist.inference.fusion import fuse_neurons
    from moe_dist.jobs.distill import DistillJob

    student = load_model(settings.directory)
    attention = config.distill.attention_weight > 0
    check_compaction(student, settings, compares_attention=attention)
    _make_room(settings.output)
    _write_by_recipe(student, config)
    tokenizer = load_tokenizer(settings.directory)
    measured = {"before": _measure(settings.directory, config, settings, "before")}
    fused, num_fused = fuse_neurons(student, settings.tolerance)
    if num_fused:
        save_model(fused, settings.output / FUSED, tokenizer=tokenizer)
        measured["fused"] = _measure(settings.output / FUSED, config, settings, "fused")
    smaller, layers = _compress(fused, config, settings, console)
    compressed = settings.output / COMPRESSED
    save_model(smaller, compressed, tokenizer=tokenizer)
    measured["compressed"] = _measure(compressed, config, settings, "compressed")
    if settings.repair_steps:
        console.note(f"repairing over {settings.repair_steps} steps")
        train = config.train.model_copy(
            update={"max_steps": settings.repair_steps, "num_epochs": MANY_EPOCHS}
        )
        DistillJob.of(
            config,
            str(settings.output),
            train=train,
            parallel=config.parallel.model_copy(update={"ep_size": 1, "zero_stage": 0}),
            student=str(compressed),
            teacher=str((settings.teacher or settings.directory).absolute()),
        ).run()
        shutil.rmtree(settings.output / "checkpoints", ignore_errors=True)
        measured["repaired"] = _measure(settings.output / MODEL, config, settings, "repaired")
    else:
        save_model(smaller, settings.output / MODEL, tokenizer=tokenizer)
    titles = measured["before"].pop("metric_titles")
    higher_is_better = measured["before"].pop("higher_is_better")
    whole = measured["before"]["metrics"]
    metric = next(iter(whole))
    for entry in measured.values():
        values = entry["metrics"][metric], whole[metric]
        entry["retention"] = ratio(*values, higher_is_better=higher_is_better)
        why = why_no_ratio(*values, metric, higher_is_better=higher_is_better)
        if why is not None:
            entry["undefined"] = f"retention is undefined: {why}"
    result = {
        "main_metric": metric,
        "metric_titles": titles,
        "higher_is_better": higher_is_better,
        "num_experts": settings.num_experts,
        "expert_size": settings.expert_size,
        "method": settings.method,
        "repaired_by": "student" if settings.teacher is None else "teacher",
        "use_samples": settings.use_samples,
        "num_fused_neurons": num_fused,
        "repair_steps": settings.repair_steps,
        "layers": layers,
        **measured,
    }
    write_json(settings.output / RESULT, result)
    return result


def _compress(
    student: Any, config: RunConfig, settings: CompactSettings, console: Console
) -> tuple[Any, list[dict[str, Any]]]:
    """Join experts, then prune them; what became of each layer."""
    from moe_dist.inference import load_tokenizer, save_model
    from moe_dist.inference.compact import compact_experts
    from moe_dist.inference.prune import prune_experts
    from moe_dist.moe.layer import moe_layers

    layers: list[dict[str, Any]] = [{"layer": layer.name} for layer in moe_layers(student)]
    if settings.num_experts is not None:
        console.note("counting how often each expert is used")
        use = _count_use(config, settings)
        student, joined = compact_experts(
            student, settings.num_experts, use=use, method=settings.method
        )
        layers = [one | asdict(own) for one, own in zip(layers, joined, strict=True)]
    if settings.expert_size is not None:
        console.note("scoring the neurons of each expert")
        unpruned = settings.output / UNPRUNED
        try:
            save_model(student, unpruned, tokenizer=load_tokenizer(settings.directory))
            scores = _score_neurons(unpruned, config, settings)
        finally:
            shutil.rmtree(unpruned, ignore_errors=True)
        student, kept = prune_experts(student, settings.expert_size, scores)
        unheard = sum(len(one.unscored_experts) for one in kept)
        if unheard:
            console.note(
                f"{unheard} experts have no score, since the task's head reads none of their "
                "tokens; they keep the neurons of the largest weights"
            )
        layers = [one | asdict(own) for one, own in zip(layers, kept, strict=True)]
    return student, layers


def to_table(result: dict[str, Any]) -> Table:
    """Draw what became of a student: one row for each state that it went through."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("student")
    metric = result["main_metric"]
    title = result["metric_titles"].get(metric, metric)
    if not result["higher_is_better"]:
        title += " (lower is better)"
    for heading in (f"dev {title}", "retention", "parameters", "active"):
        table.add_column(heading, justify="right")
    for name in ("before", "fused", "compressed", "repaired"):
        entry = result.get(name)
        if entry is not None:
            retention = entry["retention"]
            value = entry["metrics"][metric]
            table.add_row(
                name,
                UNDEFINED if value is None or math.isnan(value) else f"{value:.4f}",
                UNDEFINED if retention is None else f"{retention:.4f}",
                quantity(entry["parameters"]["total"]),
                quantity(entry["parameters"]["active"]),
            )
    return table


def _make_room(output: Path) -> None:
    """Clear what an earlier compaction left, and nothing else."""
    if output.exists() and any(output.iterdir()) and not (output / RESULT).exists():
        raise MoeDistError(
            f"{output} holds files that are not a compaction's.",
            remedy="choose another directory with --output.",
        )
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    # The mark of a compaction, so that one that was stopped can be made anew.
    (output / RESULT).write_text(json.dumps({"finished": False}) + "\n", encoding="utf-8")


def _measure(
    model: Path, config: RunConfig, settings: CompactSettings, name: str
) -> dict[str, Any]:
    from moe_dist.inference import load_model
    from moe_dist.jobs.predict import PredictJob
    from moe_dist.measure.profile import count_parameters

    answer = PredictJob.of(
        config, str(settings.output), model=str(model), output_name=f"predictions-{name}"
    ).run()
    about = {key: answer[key] for key in ("metric_titles", "higher_is_better")}
    return (about if name == "before" else {}) | {
        "metrics": answer["metrics"],
        "parameters": asdict(count_parameters(load_model(model))),
    }


def _write_by_recipe(student: Any, config: RunConfig) -> None:
    """Let a student that writes texts do so with the settings that it is measured with."""
    from moe_dist.data.mixture import load_rows
    from moe_dist.inference.generation import set_generation
    from moe_dist.jobs.job import row_arguments
    from moe_dist.jobs.job_data import shared_options
    from moe_dist.tasks import model_kind

    kind = model_kind(student)
    if kind.writes:
        options = shared_options(load_rows(row_arguments(config.data, config.seed)))
        set_generation(student, kind.generation(student, options))


def _count_use(config: RunConfig, settings: CompactSettings) -> dict[str, list[float]]:
    """Each expert's share of the tokens of training rows, by layer; of those of all tasks."""
    from moe_dist.jobs.predict import PredictJob

    job = PredictJob.of(
        config,
        str(settings.output),
        data=_fewer_rows(config.data, settings.use_samples),
        model=str(settings.directory),
        split="train",
        measures=False,
    )
    load: dict[str, list[float]] = job.run()["expert_load"]
    return load


def _score_neurons(model: Path, config: RunConfig, settings: CompactSettings) -> list[Any]:
    """The importance of each expert's neurons on training rows, by layer."""
    from moe_dist.jobs.importance import ImportanceJob
    from moe_dist.jobs.results import load_scores

    # Beside the model, and gone with it: the scores fit neither what was given nor what is made.
    job = ImportanceJob.of(
        config,
        str(model),
        model=str(model),
        num_samples=settings.use_samples,
        precision=config.train.precision,
    )
    return load_scores(Path(job.run()["scores"]))


def _fewer_rows(data: Data, limit: int) -> Data:
    """The data with so many training rows, tasks having equally many."""
    from moe_dist.data.mixture import even_share

    tasks = getattr(data, "tasks", None)
    if tasks is None:
        return data.model_copy(
            update={"max_train_samples": min(limit, data.max_train_samples or limit)}
        )
    share = even_share(limit, len(tasks))
    fewer = {name: _fewer_rows(task, share) for name, task in tasks.items()}
    return data.model_copy(update={"tasks": fewer})
