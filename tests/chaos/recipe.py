"""The chain that is hurt: tiny, in fp32, with dropout, a line and a point for each step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.hosts.ray_cluster import ROOT
from tests.training.tiny_task import write_bert, write_sentences

NAME = "tiny"
CHECKPOINT_EVERY = 4
NUM_WORKERS = 2
STEP_TIMEOUT_S = 20
PARALLEL = {
    "num_workers": NUM_WORKERS,
    "ep_size": 2,
    "zero_stage": 1,
    "use_gpu": False,
    # One run suffers many deaths here, each of which would be rare elsewhere.
    "max_failures": 50,
}


def tiny_recipe(root: Path, num_steps: int) -> dict[str, Any]:
    """Write the data and the start model, and return the recipe's settings."""
    return {
        "name": NAME,
        "model": {"teacher": write_bert(root / "bert"), "max_length": 16},
        "data": {
            "source": "files",
            "train": write_sentences(root / "train.tsv", 96, seed=1),
            "dev": write_sentences(root / "dev.tsv", 32, seed=2),
            "text_columns": "sentence",
            "label_column": "label",
        },
        "moe": {
            "num_experts": 4,
            "expert_size": 12,
            "num_shared_neurons": 8,
            "router": "token_gate",
        },
        "finetune": {"num_epochs": 1, "batch_size": 16, "learning_rate": 1e-3},
        "train": {
            "num_epochs": 1000,
            "max_steps": num_steps,
            "batch_size": 8,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "log_every": 1,
            "checkpoint_every": CHECKPOINT_EVERY,
            "step_timeout_s": STEP_TIMEOUT_S,
        },
        "parallel": PARALLEL,
    }


def prepare(recipe: dict[str, Any], root: Path) -> Path:
    """Run the stages before the distillation, untracked; they are the same for all runs.

    Returns:
        The run's directory, to be copied.
    """
    settings = recipe | {
        "output_dir": str(root / "prepared"),
        "parallel": {"launcher": "local", "use_gpu": False},
        "tracking": {"enabled": False},
    }
    path = root / "prepared.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "adapt", str(path), "--quiet"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the stages before failed:\n{done.stdout}{done.stderr}")
    return root / "prepared" / NAME
