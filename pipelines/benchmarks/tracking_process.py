"""One of the processes of `moe-dist benchmark tracking`: logs its share of the runs.

Each run is what the chain of a small model leaves: settings, a stage with curves, and a report.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from moe_dist.metric_log import METRIC_LOG, MetricLog
from moe_dist.tracking import Tracker, build_tracker

from .tracking import EXPERIMENT, STAGE, expected

NUM_LAYERS = 6
NUM_EXPERTS = 8


def main(task: str) -> None:
    """Log the runs that a JSON task names by `root`, `uri`, `numbers` and `num_steps`."""
    told = json.loads(task)
    tracker = build_tracker(told["uri"], experiment=EXPERIMENT)
    for number in told["numbers"]:
        log_run(tracker, Path(told["root"]) / f"run-{number:03d}", number, told["num_steps"])


def log_run(tracker: Tracker, directory: Path, number: int, num_steps: int) -> None:
    """Log one run, whose `number` says what it found."""
    params = {f"section.setting_{index}": index for index in range(60)}
    params |= {"moe.num_shared_neurons": 64 * (number % 8), "seed": number}
    with tracker.chain(directory.name, directory, params=params) as chain:
        with chain.stage(STAGE, directory / STAGE, params={"seed": number}):
            log = MetricLog(directory / STAGE / METRIC_LOG)
            for step in range(1, num_steps + 1):
                loss, accuracy = expected(number, step)
                log.append(step, {"train/loss/total": loss, "dev/accuracy": accuracy})
        evaluated = directory / "evaluate"
        with chain.stage("evaluate", evaluated, params={"seed": number}) as stage:
            path = evaluated / "stage.json"
            path.write_text(json.dumps({"details": {"expert_loads": _loads(number)}}))
            stage.log_artifact(path)
        content = _report(number)
        (directory / "report.json").write_text(json.dumps(content))
        chain.log_artifact(directory / "report.json")
        chain.log_metrics(0, {"retention": content["retention"]})


def _report(number: int) -> dict[str, Any]:
    retention = 0.95 + 0.0005 * (number % 97)
    return {
        "main_metric": "accuracy",
        "retention": retention,
        "teacher": _model(0.9, 22e6, 100.0),
        "student": _model(0.9 * retention, (11 + number % 5) * 1e6, 50.0 + number % 13)
        | {"retention": retention},
        "comparisons": [],
        "differences": {
            "teacher": {"metric": "accuracy", "low": 0.9 * retention - 0.92, "high": 0.01}
        },
        "seconds": {STAGE: 10.0 + number},
    }


def _model(accuracy: float, flops: float, latency_ms: float) -> dict[str, Any]:
    return {
        "metrics": {"accuracy": accuracy},
        "parameters": {"total": flops, "active": flops},
        "flops_per_token": flops,
        "latency_ms": {"1": latency_ms, "32": 10 * latency_ms},
    }


def _loads(number: int) -> dict[str, dict[str, list[float]]]:
    shares = [1.0 + (number + expert) % 5 for expert in range(NUM_EXPERTS)]
    layer = [share / sum(shares) for share in shares]
    return {"student": {f"encoder.layer.{index}": layer for index in range(NUM_LAYERS)}}


if __name__ == "__main__":
    main(sys.argv[1])
