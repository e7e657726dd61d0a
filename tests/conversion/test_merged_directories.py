"""Students with merged experts are saved and come back in a fresh process, of every family."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.inference import save_model
from tests.conversion.dense_models import (
    EVERY_FAMILY,
    model_inputs,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.inference.test_saving import run_python
from tests.moe.merged import MERGED, draw_gates

LOAD_ALL = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from moe_dist.inference import load_model, save_model
found = {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model = load_model(directory / "model")
    batch = load_file(directory / "batch.safetensors")
    expected = batch.pop("expected")
    with torch.no_grad():
        gap = float((model(**batch).logits - expected).abs().max())
    again = save_model(model, directory / "again")
    files = sorted(path.name for path in again.iterdir())
    unlike = [
        name for name in files
        if (again / name).read_bytes() != (directory / "model" / name).read_bytes()
    ]
    found[directory.name] = [type(model).__name__, gap, len(files), unlike]
print(json.dumps(found))
"""


def options_of(router: str) -> dict[str, Any]:
    return {"merge_gates": "one", "top_k": 3} if router == "merged_token" else {"top_k": 2}


@pytest.fixture(scope="module")
def come_back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    root = tmp_path_factory.mktemp("merged")
    for family in EVERY_FAMILY:
        for router in MERGED:
            directory = root / f"{family} {router}"
            model = tiny_model(family)
            plan = plan_partition(
                random_scores(model), num_experts=4, expert_size=8, num_shared_neurons=0
            )
            student = dense_to_moe(
                model, plan, router=router, segment_length=2, **options_of(router)
            )
            draw_gates(student)
            batch = model_inputs(model, token_batch(num_samples=2, length=5))
            save_model(student, directory / "model")
            with torch.no_grad():
                batch["expected"] = student.eval()(**batch).logits
            save_file(
                {name: one.clone() for name, one in batch.items()}, directory / "batch.safetensors"
            )
    done = run_python(LOAD_ALL, root)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("router", MERGED)
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_it_comes_back_and_is_saved_alike(
    family: str, router: str, come_back: dict[str, list[Any]]
) -> None:
    name, gap, num_files, unlike = come_back[f"{family} {router}"]
    assert name == f"Moe{type(tiny_model(family)).__name__}"
    # Products may be rounded otherwise where memory lies otherwise; the files below are the same.
    assert gap <= 1e-6
    assert num_files >= 3
    assert unlike == []
