"""Which metrics people see in MLflow: few enough that those that matter are found.

A model of 12 layers and 8 experts measures over a hundred loads at each evaluation. MLflow draws a
chart for each metric, so it gets two figures in their place; the metric log keeps all of them, and
goes to the run as an artifact.
"""

from __future__ import annotations

from collections.abc import Mapping

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
