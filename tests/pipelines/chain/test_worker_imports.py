"""What a worker's process imports, and what it does not."""

from __future__ import annotations

import json
import subprocess
import sys

from pipelines.chain.chain import WORKER_IMPORTS

# What a worker never uses, and what would cost it seconds of a core at every start.
UNWANTED = {
    "alembic",
    "fastapi",
    "IPython",
    "matplotlib",
    "mlflow",
    "optuna",
    "rouge_score",
    "sacrebleu",
    "sentence_transformers",
    "sklearn",
    "sqlalchemy",
    "tensorboard",
    "tensorboardX",
    "tensorflow",
    "torchvision",
}


def imported(*modules: str) -> set[str]:
    """Import modules in a process of their own; the names of all packages that it then has."""
    script = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *modules], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_a_worker_imports_nothing_that_it_does_not_use() -> None:
    packages = imported(*WORKER_IMPORTS)
    assert {"torch", "transformers", "datasets", "deepspeed"} <= packages
    assert not packages & UNWANTED
    # Its library takes settings of its own from the process that is forked, and comes after.
    assert "ray" not in packages


def test_ray_train_brings_little_into_a_worker() -> None:
    entry = ("ray.train.torch", "moe_dist.workers.driver", "moe_dist.workers.process_group")
    packages = imported(*entry)
    heavy = {"transformers", "datasets", "deepspeed", "scipy"}
    # Ray Train's own process imports `tensorboardX` wherever it is installed.
    assert not packages & ((UNWANTED | heavy) - {"tensorboardX"})
