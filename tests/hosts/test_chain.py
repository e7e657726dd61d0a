"""The chain over two hosts gives what it gives on one, and its ranks ran on both."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_dist.inference.saving import load_model
from tests.hosts.ray_cluster import ROOT, RayCluster
from tests.training.tiny_task import write_bert, write_sentences

pytestmark = [pytest.mark.hosts, pytest.mark.ray, pytest.mark.timeout(600)]

# Ranks draw dropout on their own, so only without it can two ranks equal one.
TRAINING = {
    "num_epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "lr_schedule": "constant",
}


def write_recipe(root: Path) -> Path:
    recipe = {
        "name": "tiny",
        "model": {"teacher": write_bert(root / "bert", dropout=0.0), "max_length": 16},
        "data": {
            "source": "files",
            "train": write_sentences(root / "train.tsv", 96, seed=1),
            "dev": write_sentences(root / "dev.tsv", 32, seed=2),
            "text_columns": "sentence",
            "label_column": "label",
        },
        "moe": {"num_experts": 4, "expert_size": 12, "num_shared_neurons": 8, "tie_shared": True},
        "finetune": TRAINING,
        "train": TRAINING | {"precision": "fp32"},
        "tracking": {"enabled": False},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def compress(recipe: Path, output_dir: Path, *settings: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pipelines", "compress", str(recipe)),
        *("--set", f"output_dir={output_dir}"),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_two_hosts_give_what_one_gives(ray_cluster: RayCluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    one, two = tmp_path / "one" / "tiny", tmp_path / "two" / "tiny"
    environment = ray_cluster.environment()
    spread = ("parallel.num_workers=2", "parallel.ep_size=2", "parallel.zero_stage=1")
    run(
        ray_cluster.hosts.a.command(*compress(recipe, two.parent, *spread)),
        environment | {"RAY_ADDRESS": ray_cluster.address},
    )
    # A teacher may train in bf16, where the number of workers shows: both start from the same one.
    shutil.copytree(two / "finetune-teacher", one / "finetune-teacher")
    run(compress(recipe, one.parent), environment)
    expected = load_model(one / "distill" / "model").state_dict()
    for name, value in load_model(two / "distill" / "model").state_dict().items():
        assert (value - expected[name]).abs().max() < 1e-4, name
    reports = [json.loads((root / "report.json").read_text()) for root in (one, two)]
    assert reports[0]["student"]["metrics"] == pytest.approx(reports[1]["student"]["metrics"])


def test_ranks_are_on_both_hosts(ray_cluster: RayCluster, tmp_path: Path) -> None:
    code = """
import json, sys
from pathlib import Path
from moe_dist.workers.driver import run_on_workers

def job(payload):
    import os, ray, torch.distributed as dist
    mine = (ray.util.get_node_ip_address(), os.environ["GLOO_SOCKET_IFNAME"])
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found

result = run_on_workers(job, {}, num_workers=2, storage_path=Path(sys.argv[1]), name="job")
print(json.dumps(result.value))
"""
    done = subprocess.run(
        ray_cluster.hosts.a.command(sys.executable, "-c", code, str(tmp_path)),
        env=ray_cluster.environment() | {"RAY_ADDRESS": ray_cluster.address},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    a, b = ray_cluster.hosts.a.address, ray_cluster.hosts.b.address
    assert sorted(json.loads(done.stdout.splitlines()[-1])) == [[a, "mdt0"], [b, "mdt0"]]
