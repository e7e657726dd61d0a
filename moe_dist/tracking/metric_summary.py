"""What people see in MLflow first: few metrics, the experiment as one of models, a list of columns.

A model of 12 layers and 8 experts measures over a hundred loads at each evaluation. MLflow draws a
chart for each metric, so it gets two figures in their place; the metric log keeps all of them, and
goes to the run as an artifact.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

VIEW_KEY = "moe-dist"
"""`?viewStateShareKey=moe-dist` behind the address of an experiment's runs shows these columns."""
_COLUMNS = {
    "attributes": ("Source", "Models", "Dataset"),
    "metrics": (
        "retention",
        "student/accuracy",
        "teacher/accuracy",
        "student/hidden_error",
        "student/latency_ms_batch_1",
    ),
    "tags": ("router", "partition", "num_experts", "seed"),
}
IMBALANCE_PREFIX = "moe/load_imbalance/"
LOAD_PREFIX = "moe/expert_load/"


def summarise_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Replace the figures of single layers and experts by their summary.

    Args:
        metrics: one record of a metric log.

    Returns:
        `moe/load_imbalance_worst` and `moe/load_imbalance_mean` over the layers (the busiest
        expert's load over the mean load; 1 is even) in place of each layer's, the same with
        `dev_` for the loads of an evaluation, and all other metrics as they are.
    """
    shown: dict[str, float] = {}
    imbalances: list[float] = []
    loads: dict[str, list[float]] = {}
    for name, value in metrics.items():
        if name.startswith(IMBALANCE_PREFIX):
            imbalances.append(value)
        elif name.startswith(LOAD_PREFIX):
            loads.setdefault(name.rpartition("/")[0], []).append(value)
        else:
            shown[name] = value
    # Shares of a layer add up to 1.
    measured = [max(shares) * len(shares) for shares in loads.values()]
    for label, values in (("load_imbalance", imbalances), ("dev_load_imbalance", measured)):
        if values:
            shown[f"moe/{label}_worst"] = max(values)
            shown[f"moe/{label}_mean"] = sum(values) / len(values)
    return shown


def experiment_tags() -> dict[str, str]:
    """Say how MLflow's pages show an experiment that nobody has told them how to.

    Returns:
        Tags: it is about models that are trained (else its runs are shown as evaluations of
        language models), and a saved view of the run list with the columns that matter.
    """
    columns = [f"{kind}.`{name}`" for kind, names in _COLUMNS.items() for name in names]
    now_ms = int(time.time() * 1000)
    view = {
        "name": VIEW_KEY,
        "createdAt": now_ms,
        "updatedAt": now_ms,
        "state": json.dumps({"selectedColumns": columns}),
    }
    return {
        "mlflow.experimentKind": "custom_model_development",
        f"mlflow.sharedViewState.{VIEW_KEY}": json.dumps(view),
    }
