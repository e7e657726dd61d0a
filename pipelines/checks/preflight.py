"""What can be found wrong before anything starts, so that no hour of training is lost to it.

Every run checks the recipe against its data and its model, and a run on a cluster the cluster too,
as far as that costs seconds. `moe-dist preflight` does the same, measures the network, and lists
everything at once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from moe_dist.config.data_checks import data_sections
from moe_dist.config.merge_checks import merge_notes
from moe_dist.errors import ClusterError, ConfigError, ConversionError, MoeDistError
from moe_dist.redaction import hide_secrets

from ..chain.workspace import Workspace
from ..report.report import RESERVED_LABELS
from .cluster_package import cluster_module
from .data_summaries import MANY_ROWS, data_heading, say_summaries
from .sizes import (
    BYTES_FP32,
    GIB,
    derive_sizes,
    refuse_misfits,
    start_skeleton,
)

if TYPE_CHECKING:
    from cluster.findings import Finding
    from moe_dist.config import RunConfig
    from moe_dist.data.mixture import Rows
    from moe_dist.data.sources import Splits

    from ..console import Console

_LOOKED_AT = 200
"""Texts of each task that the start model's tokenizer is tried on."""


def check_before_start(config: RunConfig, workspace: Workspace) -> None:
    """Read the data, find the start model, and see that they fit the recipe.

    Args:
        config: the run's configuration.
        workspace: finds data and start model.

    Raises:
        ConfigError: if a comparison's name is taken, or experts or lengths do not fit the model.
        DataError: if the data cannot be used.
        ConversionError: if the model cannot be read or has no feed-forward layers that we know.
    """
    _check_labels(config)
    workspace.console.note(f"{config.name}: results in {workspace.files.shown(workspace.root)}")
    num_parameters = _check_data_and_model(config, workspace)
    warn_of_little_space(workspace, num_parameters, num_trained=2 + len(config.compare))


def check_before_submit(config: RunConfig, workspace: Workspace) -> None:
    """See that data, model and recipe fit, on a machine that only submits the run.

    Args:
        config: the run's configuration.
        workspace: finds data and start model; nothing is written into it.

    Raises:
        ConfigError: if a comparison's name is taken, or experts or lengths do not fit the model.
        DataError: if the data cannot be used.
        ConversionError: if the model cannot be read or has no feed-forward layers that we know.
    """
    _check_labels(config)
    teacher = config.model.teacher
    travels = teacher.startswith(("package:", "scratch:")) or Path(teacher).is_dir()
    if any(data.source == "hub" for data in data_sections(config).values()) or not travels:
        workspace.console.note("data or model come from the hub: the job checks them")
        return
    _check_data_and_model(config, workspace)


def _check_labels(config: RunConfig) -> None:
    taken = sorted(RESERVED_LABELS.intersection(config.compare))
    if taken:
        raise ConfigError(
            [
                f"compare.{label}: this name has another meaning in report.json; choose another."
                for label in taken
            ]
        )


def _check_data_and_model(config: RunConfig, workspace: Workspace) -> int:
    """Check them against each other and give the model's number of parameters."""
    from moe_dist.conversion.heads import set_heads
    from moe_dist.data.mixture import Mixture
    from moe_dist.jobs.job_data import task_heads

    rows = workspace.rows
    say_merging(workspace)
    say_metrics(workspace)
    model = start_skeleton(workspace, rows.num_labels)
    if isinstance(rows, Mixture):
        set_heads(model, task_heads(rows))
    refuse_misfits(model, config)
    check_start_model(workspace, rows)
    num_rows = sum(len(splits.train) + len(splits.dev) for splits in rows.parts.values())
    if num_rows >= MANY_ROWS:
        workspace.console.note(f"tokenising {num_rows} rows, to see how many are cut")
    say_summaries(workspace.summaries, workspace.console)
    return sum(parameter.numel() for parameter in model.parameters())


def say_merging(workspace: Workspace) -> None:
    """Warn of what merging does to the students' starts."""
    for line in merge_notes(workspace.config):
        workspace.console.warn(line)


def say_metrics(workspace: Workspace) -> None:
    """Say what each task is measured by, and what that cannot tell on its rows."""
    rows, console = workspace.rows, workspace.console
    console.name_metrics(rows.metric_titles)
    for task, splits in rows.parts.items():
        titles = ", ".join(splits.metric_titles.values())
        console.note(f"{data_heading(task)}: measured by {titles}")
        for line in metric_faults(task, splits):
            console.warn(line)


def metric_faults(name: str, splits: Splits) -> list[str]:
    """Say what metrics cannot tell on rows such as these, whatever a model predicts."""
    from moe_dist.data.metrics import (
        METRICS,
        metric_title,
        missing_classes,
        undefined_by_labels,
    )

    task, of_task = splits.task, f" of {name}" if name else ""
    space, lines = task.label_space, []
    for place, rows in (("dev", splits.dev), ("hold-out", splits.holdout)):
        if rows is None:
            continue
        for metric in task.metrics:
            title = metric_title(metric, space)
            labels = rows["label"] if METRICS[metric].reads_labels else ()
            why = undefined_by_labels(metric, labels, space)
            absent = missing_classes(metric, labels, space)
            if why is not None:
                lines.append(f"{title} is undefined on the {place} rows{of_task}: {why}")
            if absent:
                lines.append(
                    f"{title} counts classes that the {place} rows{of_task} lack as 0, so that it "
                    f"stays below 1: {', '.join(absent)}"
                )
    return lines


def check_start_model(workspace: Workspace, rows: Rows) -> None:
    """See that weights and tokenizer fit, or raise ConversionError; say what is new or guessed."""
    from moe_dist.inference.pretrained import check_pretrained
    from moe_dist.inference.scratch import scratch_line
    from moe_dist.inference.start_tokenizer import MAX_UNKNOWN, check_end, unknown_share
    from moe_dist.jobs.job_data import label_names, shared_kind, shared_options

    start = check_pretrained(
        workspace.start_model,
        num_labels=rows.num_labels,
        label_names=label_names(rows),
        kind=shared_kind(rows),
        options=shared_options(rows),
    )
    if any(splits.train[0]["text_b"] is not None for splits in rows.parts.values()):
        check_end(start.tokenizer, start.model, "a", "b")
    if workspace.config.teacher_train.num_epochs == 0 and not start.is_whole:
        raise ConversionError(
            f"model.teacher: {workspace.config.model.teacher!r} has no trained head for this task "
            f"({'; '.join(start.notes)}), and finetune.num_epochs=0 trains none",
            remedy="set finetune.num_epochs to 1 or more, or give a model that was trained for it",
        )
    from_nothing = scratch_line(workspace.config.model.teacher)
    for line in (*((from_nothing,) if from_nothing else ()), *start.notes):
        workspace.console.note(f"start model: {line}")
    for line in start.warnings:
        workspace.console.warn(f"start model: {line}")
    for task, splits in rows.parts.items():
        texts = splits.train[: min(_LOOKED_AT, len(splits.train))]["text_a"]
        share = unknown_share(start.tokenizer, texts)
        if share > MAX_UNKNOWN:
            of_task = f" of {task}" if task else ""
            workspace.console.warn(
                f"start model: its tokenizer does not know {share:.0%} of the tokens of the "
                f"first texts{of_task}; is it the one that belongs to model and language?"
            )


def warn_of_little_space(workspace: Workspace, num_parameters: int, *, num_trained: int) -> None:
    """Warn where a whole run may not fit on the disk; finished stages may make it fit all the same.

    `num_trained` counts teacher, student and comparisons.
    """
    # Every model, and of the one in training up to three checkpoints (two kept, one being
    # written) with two moments each; a finished stage keeps none.
    needed_bytes = (num_trained + 3 * 3) * num_parameters * BYTES_FP32
    free_bytes = shutil.disk_usage(workspace.root).free
    if free_bytes < needed_bytes:
        workspace.console.warn(
            f"a whole run may need {needed_bytes / GIB:.1f} GiB, and {free_bytes / GIB:.1f} GiB "
            f"are free where {workspace.root} lies"
        )


def run_preflight(config: RunConfig, console: Console, *, as_json: bool = False) -> bool:
    """Check a recipe and its cluster, print what was found, and say whether there is no fault."""
    workspace = Workspace(config, console)
    findings = find_all(workspace)
    is_sound = all(finding.state != "fault" for finding in findings)
    if as_json:
        content = {"ok": is_sound, "findings": [asdict(finding) for finding in findings]}
        if is_sound:
            content["data"] = {task: asdict(found) for task, found in workspace.summaries.items()}
        console.result(json.dumps(content, indent=1))
        return is_sound
    console.result(_findings_table(findings))
    for finding in findings:
        if finding.remedy:
            console.result(f"{finding.state}, {finding.check}: {finding.remedy}")
    console.result("ready to run" if is_sound else "not ready: mend the faults above")
    return is_sound


def find_all(workspace: Workspace) -> list[Finding]:
    """Check recipe, cluster and network; one fault does not keep the others from being found."""
    from moe_dist.workers.driver import runs_here
    from moe_dist.workers.ray_session import ray_session
    from moe_dist.workers.worker_cpus import worker_cpus

    checks = cluster_module("preflight")
    config = workspace.config
    findings, memory_gib = _find_in_recipe(workspace)
    findings += _find_in_tracking(config)
    parallel = config.parallel
    if runs_here(parallel.launcher, parallel.num_workers):
        num_threads = worker_cpus(parallel)
        found = f"one, in this process with {num_threads} thread{'s' * (num_threads > 1)}, no Ray"
        return [*findings, checks.Finding("workers", "ok", found)]
    with ray_session() as session:
        scope = checks.Scope(config, session, memory_gib)
        try:
            of_cluster = checks.check_cluster(scope)
        except ClusterError as error:
            return [*findings, checks.Finding("cluster", "fault", error.message, error.remedy)]
        if any(finding.state == "fault" for finding in of_cluster):
            left_out = checks.Finding(
                "all-to-all",
                "warning",
                "not measured, because of the faults above",
                "Mend them, then run preflight again.",
            )
            return [*findings, *of_cluster, left_out]
        return [*findings, *of_cluster, *checks.check_exchange(scope)]


def _find_in_recipe(workspace: Workspace) -> tuple[list[Finding], float | None]:
    """Check recipe, data and model; also gives the GiB that a rank needs, where known."""
    checks = cluster_module("preflight")
    config = workspace.config
    try:
        workspace.files.prepare(config.name)
        check_before_start(config, workspace)
        sizes = derive_sizes(config, workspace)
    except ConfigError as error:
        return [checks.Finding("recipe", "fault", fault) for fault in error.faults], None
    except MoeDistError as error:
        return [checks.Finding("recipe", "fault", error.message, error.remedy)], None
    finally:
        workspace.files.remove_if_empty()
    found = "fits its data and its model"
    memory_gib = max((model.memory_gib for model in sizes.models), default=None)
    return [checks.Finding("recipe", "ok", found)], memory_gib


def _find_in_tracking(config: RunConfig) -> list[Finding]:
    """See that the tracking store answers, as a run does before its first stage."""
    from moe_dist.errors import TrackingError
    from moe_dist.tracking import check_store

    if not config.tracking.enabled:
        return []
    try:
        check_store(config.tracking.uri)
    except TrackingError as error:
        finding = cluster_module("preflight").Finding
        return [finding("tracking", "fault", error.message, error.remedy)]
    return []


def _findings_table(findings: list[Finding]) -> Table:
    colours = {"ok": "green", "warning": "yellow", "fault": "red"}
    table = Table("check", "", "found", box=box.SIMPLE_HEAD, pad_edge=False)
    for finding in findings:
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        table.add_row(finding.check, state, escape(hide_secrets(finding.found)))
    return table
