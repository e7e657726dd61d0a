"""Experiment tracking: one run for a chain, one child for each stage, in MLflow.

```python
tracker = build_tracker("sqlite:///mlflow.db", experiment="moe-dist")     # TrackingError at once
with tracker.chain("demo", Path("outputs/demo"), params=flatten(config), tags={}) as chain:
    chain.log_artifact(Path("outputs/demo/recipe.yaml"))
    with chain.stage("distill", stage_dir, params={...}, fingerprint="ab12") as stage:
        stage.log_dataset(DatasetInput("sst2/train", digest=..., source="package", num_rows=9000))
        ...                              # workers append to stage_dir/metrics.jsonl; it is followed
        stage.log_metrics(0, {"dev/accuracy": 0.84})               # the same file, from the driver
        stage.log_artifact(stage_dir / "loss.png", folder="plots")
    print(chain.run_id, chain.open_hint())
```

A `with` block that ends well leaves the run FINISHED; an exception leaves it FAILED, and Ctrl-C
KILLED. `Tracker` and `TrackedRun` are the protocols; `NullTracker` keeps the metric files and
sends nothing. No call here waits for the server, and none fails because it is away: what should
be there is noted in `<directory>/tracking.json`, and a thread sends what the server lacks. The
same directory with the same fingerprint continues the same run; a chain's is its `identity`: the
parameters without those of placement and observation, such as `parallel` and `compare`.
"""

from __future__ import annotations

from moe_dist.tracking.connection import check_store
from moe_dist.tracking.metric_summary import summarise_metrics
from moe_dist.tracking.null import NullTracker
from moe_dist.tracking.privacy import flatten, redact_uri, scrub
from moe_dist.tracking.protocols import (
    DatasetInput,
    StageNote,
    TrackedModel,
    TrackedRun,
    Tracker,
)
from moe_dist.tracking.reading import (
    SORT_PROPERTIES,
    RecordedRun,
    RunReader,
    recorded_id,
    sort_runs,
)
from moe_dist.tracking.runs import build_tracker, recipe_hash

__all__ = [
    "SORT_PROPERTIES",
    "DatasetInput",
    "NullTracker",
    "RecordedRun",
    "RunReader",
    "StageNote",
    "TrackedModel",
    "TrackedRun",
    "Tracker",
    "build_tracker",
    "check_store",
    "flatten",
    "recipe_hash",
    "recorded_id",
    "redact_uri",
    "scrub",
    "summarise_metrics",
    "sort_runs",
]
