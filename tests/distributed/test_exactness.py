"""Training on several processes equals training on one: every step, weight and moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moe_dist.distributed import spawn_gloo
from tests.distributed.tiny_moe import CLIP, Case
from tests.distributed.workers import run_bert, run_case, run_edges, run_lopsided, run_world

# The first test waits for all processes, which on a busy machine takes minutes.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

TOLERANCE = 1e-5
CASES = [
    Case(world, ep, zero, accumulation)
    for world in (2, 4)
    for ep in (1, 2, 4)
    if ep <= world
    for zero in (0, 1, 2)
    for accumulation in (1, 2)
] + [Case(2, 2, 2, clip=0.0), Case(4, 2, 1, clip=0.0)]
PLACED = [Case(2, 2, 0, is_placed=True), Case(2, 2, 2, is_placed=True)]
PLACED += [Case(4, 2, 1, is_placed=True), Case(4, 4, 0, 2, is_placed=True)]
CASES += PLACED
LOCAL = Case(1, 1, 0)
# Where a checkpoint was written, and where the run goes on.
RESUMES = [
    (LOCAL, Case(2, 2, 2)),
    (LOCAL, Case(4, 4, 1)),
    (Case(2, 2, 0), Case(4, 2, 2)),
    (Case(2, 2, 1), Case(4, 4, 0)),
    (Case(2, 2, 2), Case(4, 1, 1)),
    (Case(2, 1, 2), Case(4, 4, 2)),
    (Case(2, 2, 1), LOCAL),
    (Case(4, 4, 2), LOCAL),
    (Case(4, 2, 2), Case(2, 2, 1)),
    (Case(4, 1, 0), Case(2, 2, 0)),
    (Case(4, 4, 1), Case(2, 1, 2)),
    (PLACED[0], LOCAL),
    (LOCAL, PLACED[1]),
    (PLACED[1], Case(4, 2, 1)),
    (PLACED[3], Case(2, 2, 0)),
]


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything once; one spawn for each world size, since starting costs seconds."""
    out = tmp_path_factory.mktemp("distributed")
    saved = {source.name for source, _ in RESUMES}
    run_case(LOCAL, out, checkpoint=True)
    run_case(Case(1, 1, 0, clip=0.0), out, checkpoint=False)
    written = {LOCAL.name}
    pending = list(RESUMES)

    def ready(world: int) -> list[tuple[str, Case]]:
        """Take the resumes of this world size whose checkpoint exists by now."""
        taken = [(s, c) for s, c in pending if c.world == world and s.name in written]
        for pair in taken:
            pending.remove(pair)
        return [(source.name, case) for source, case in taken]

    for world in (2, 4):
        cases = [case for case in CASES if case.world == world]
        written |= {case.name for case in cases} & saved
        spawn_gloo(run_world, world, cases, sorted(saved), ready(world), out)
    spawn_gloo(run_edges, 2, ready(2), out)
    for source, case in ready(1):
        run_world(0, 1, [], [], [(source, case)], out)
    assert not pending
    return out


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to the tensor's size."""
    assert actual.keys() == expected.keys()
    return {
        key: float((actual[key].double() - value.double()).abs().max())
        / max(1e-3, float(value.double().abs().max()))
        for key, value in expected.items()
        if value.numel()
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = {k: d for k, d in differences(actual, expected).items() if not d <= TOLERANCE}
    assert not wrong


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ten_steps_equal_one_process(results: Path, case: Case) -> None:
    """Logits, first gradients (as moments), last weights and moments, and every norm agree."""
    actual = load_file(results / f"{case.name}.safetensors")
    oracle = load_file(results / f"{Case(1, 1, 0, clip=case.clip).name}.safetensors")
    assert_equal(actual, oracle)


def test_clipping_was_active(results: Path) -> None:
    """The oracle itself clips in every step, or the test above would not cover it."""
    norms = load_file(results / f"{LOCAL.name}.safetensors")["norms"]
    assert float(norms.min()) > CLIP


@pytest.mark.parametrize(
    ("source", "case"), RESUMES, ids=[f"{s.name}-to-{c.name}" for s, c in RESUMES]
)
def test_resumed_run_equals_the_unbroken_one(results: Path, source: Case, case: Case) -> None:
    """A checkpoint of any size goes on at any other as if nothing had happened."""
    actual = load_file(results / f"{source.name}--{case.name}.safetensors")
    oracle = load_file(results / f"{LOCAL.name}.safetensors")
    last = {k: v for k, v in actual.items() if k.startswith("last.")}
    assert_equal(last, {k: v for k, v in oracle.items() if k.startswith("last.")})
    torch.testing.assert_close(actual["norms"], oracle["norms"][5:], rtol=TOLERANCE, atol=0)


def test_moments_survive_the_way_through_a_file(results: Path) -> None:
    """What was loaded at another size is bit for bit what was saved."""
    for source, case in RESUMES:
        loaded = load_file(results / f"{source.name}--{case.name}.safetensors")
        place = results / "checkpoints" / source.name / "step-00000005"
        stored = load_file(place / "model.safetensors") | load_file(place / "optimizer.safetensors")
        for key, value in stored.items():
            assert torch.equal(loaded[f"loaded.{key}"], value), (source, case, key)


def test_every_rank_sees_the_same_fault(results: Path) -> None:
    """Damage and a failing write are the same named error, or the same fallback, everywhere."""
    found = [edges(results, rank)["faults"] for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["fallback_step"] == 1
    assert "optimizer.safetensors is damaged" in found[0]["named"]
    assert "could not be written" in found[0]["unwritable"]


def test_ranks_that_receive_no_token(results: Path) -> None:
    """With all tokens at one expert the others have zero gradients, and nothing hangs."""
    actual = load_file(results / "lopsided.safetensors")
    assert_equal(actual, run_lopsided(LOCAL))
    assert float(actual["exp_avg.hashed.experts.w_in"][1:].abs().max()) == 0.0
    assert float(actual["exp_avg.hashed.experts.w_in"][0].abs().max()) > 0.0


def test_converted_bert_equals_one_process(results: Path) -> None:
    """Hooks, tied shared neurons and recomputation work under expert parallelism and ZeRO."""
    assert_equal(load_file(results / "bert.safetensors"), run_bert(LOCAL))


def test_bf16_keeps_fp32_weights(results: Path) -> None:
    """Under bf16 only the computation changes: norms stay within a few percent."""
    found = edges(results, 0)["bf16"]
    assert found["dtype"] == "torch.bfloat16"
    assert found["weights"] == ["torch.float32"]
    assert 0 < found["gap"] < 0.05


def test_refusals(results: Path) -> None:
    """An ep_size that does not divide and a NaN gradient are errors; weights stay untouched."""
    for rank in range(2):
        found = edges(results, rank)["refusals"]
        assert "parallel.ep_size=3 does not divide 2 workers" in found["ep_size"]
        for zero in (0, 1):
            assert "gradient norm became" in found[f"nan.{zero}"]
            assert found[f"untouched.{zero}"]


def edges(results: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / f"edges-{rank}.json").read_text())
    return found
