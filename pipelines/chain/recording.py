"""What a chain tells the tracking server beside its parameters: tags to filter by, and models."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.tracking import TrackedModel, redact_uri

from ..checks.cluster_package import cluster_module
from ..stages import distill, evaluate, finetune_teacher
from ..stages.writers import writes_texts, written_model
from .stage import StageResult, stage_key

if TYPE_CHECKING:
    from moe_dist.config import RunConfig
    from moe_dist.data.mixture import Rows
    from moe_dist.tracking import TrackedRun

    from .workspace import Workspace

MODEL_OUTPUT = "model"
GIT_TIMEOUT_S = 5.0


def chain_tags(config: RunConfig) -> dict[str, str]:
    """Give what people filter and group runs by; `git_commit` only from a checkout."""
    return {
        **source_tags(),
        "router": config.moe.router,
        "partition": config.moe.partition,
        "num_experts": str(config.moe.num_experts),
        "num_shared_neurons": str(config.moe.num_shared_neurons),
        "seed": str(config.seed),
    }


def metric_tags(rows: Rows) -> dict[str, str]:
    """Say what a run is measured by: the tag `measured_by`, such as `f1 of ok, accuracy`."""
    return {"measured_by": ", ".join(rows.metric_titles.values())}


def source_tags() -> dict[str, str]:
    """Say where the program runs, and from what source; `git_commit` only from a checkout."""
    from moe_dist import __version__

    in_job = cluster_module("lasting").in_ray_job()
    tags = {
        "mlflow.source.name": "moe-dist",
        "mlflow.source.type": "JOB" if in_job else "LOCAL",
        "moe_dist.version": __version__,
        "cluster": redact_uri(os.environ.get("RAY_ADDRESS", "")) or "local",
    }
    commit = _git_commit()
    if commit:
        # MLflow shows the second as the version of the source; the first can be a column.
        tags |= {"git_commit": commit, "mlflow.source.git.commit": commit}
    return tags


def log_models(
    config: RunConfig,
    workspace: Workspace,
    chain: TrackedRun,
    results: Mapping[str, StageResult],
) -> None:
    """Log the trained models of a chain, and register the student where the recipe asks for it.

    A stage that was skipped counts too, so that a finished chain can still be registered. Of one
    that writes texts it is the directory whose settings are those that it was measured with. A
    model of several tasks is logged once for each, since what it takes and gives differs.
    """
    tracking = config.tracking
    if not (tracking.enabled and tracking.log_models):
        return
    measured = results.get(evaluate.NAME)
    entries = measured.details["models"] if measured is not None else {}
    owners = {evaluate.TEACHER: finetune_teacher.NAME, evaluate.STUDENT: distill.NAME}
    owners |= {label: stage_key(distill.NAME, label) for label in config.compare}
    for name, key in owners.items():
        if key not in results:
            continue
        directory = results[key].outputs[MODEL_OUTPUT]
        digest = results[key].digests[MODEL_OUTPUT]
        if measured is not None and writes_texts(workspace):
            directory = written_model(measured, name)
            digest = workspace.files.digest(directory)
        register_as = tracking.register_model if name == evaluate.STUDENT else ""
        for task, splits in workspace.rows.parts.items():
            kind = splits.task.task_kind
            chain.log_model(
                TrackedModel(
                    name=f"{name}-{task}" if task else name,
                    directory=workspace.files.fetch(directory),
                    digest=digest,
                    num_texts=len(splits.task.text_columns) if kind.reads_pairs else 1,
                    labels=tuple(splits.task.label_names or ()),
                    max_length=config.model.max_length,
                    register_as=f"{register_as}-{task}" if register_as and task else register_as,
                    params=_model_params(config, name) | ({"task": task} if task else {}),
                    task=task,
                    answers=dict(kind.served_columns),
                    # Of one text any name will do, and none.
                    inputs=kind.text_columns if kind.reads_pairs else (),
                    options=splits.task.options,
                    calibration=entries.get(name, {}).get("calibrations", {}).get(task),
                )
            )


def _model_params(config: RunConfig, name: str) -> dict[str, str]:
    if name == evaluate.TEACHER:
        return {"run": config.name, "start_model": config.model.teacher}
    own = config if name == evaluate.STUDENT else config.resolve_comparison(name)
    moe = own.moe
    return {
        "run": config.name,
        "router": moe.router if moe.num_experts > 1 else "none",
        "partition": moe.partition,
        "num_experts": str(moe.num_experts),
        "expert_size": str(moe.expert_size),
        "num_shared_neurons": str(moe.num_shared_neurons),
        "top_k": str(moe.top_k),
    }


def _git_commit() -> str:
    """Name the commit of the checkout that runs; empty for an installed package."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
