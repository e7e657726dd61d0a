"""A short part of `make test-chaos`: one run that loses a worker, and does not notice."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.chaos.recipe import prepare, tiny_recipe
from tests.chaos.scenario import disturbed, steps_for, undisturbed
from tests.chaos.testbeds import Testbed

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(900)]

# A worker dies, and the newest checkpoint is broken; the suite has the other kinds.
QUICK = ("checkpoint damaged",)


def test_a_run_that_is_hurt_equals_one_that_is_not(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two workers need two CPUs")
    recipe = tiny_recipe(tmp_path, steps_for(len(QUICK)))
    prepared = prepare(recipe, tmp_path)
    with Testbed(with_server=False) as testbed:
        expected = undisturbed(
            testbed, recipe, prepared, records=tmp_path / "calm", output_dir=tmp_path / "a"
        )
        verdict = disturbed(
            testbed,
            recipe,
            prepared,
            expected,
            QUICK,
            random.Random(0),
            records=tmp_path / "hurt",
            output_dir=tmp_path / "b",
        )
    assert verdict.problems == []
    assert all(incident.num_repeated > 0 for incident in verdict.incidents)
