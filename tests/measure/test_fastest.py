"""A model's fastest form: found among those that answer alike, and why others are left out."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.errors import ConversionError
from moe_dist.inference.backends import ORACLE
from moe_dist.measure import fastest
from moe_dist.measure.fastest import MAX_COMPARED, Speedup, find_fastest, relative_error
from moe_dist.measure.latency import Latency, Rounds
from tests.conversion.dense_models import tiny_model
from tests.inference.moe_students import student

ROUNDS = Rounds(2)
DELAY_MS = 50.0


@dataclass(frozen=True)
class MadeUp:
    """A form that takes no time, or as long as the model as it is, and may answer otherwise."""

    name: str
    scale: float = 1.0
    is_fast: bool = True
    fault: Exception | None = None
    compiles: bool = False

    def __str__(self) -> str:
        return self.name

    def prepare(self, model: Any) -> Any:
        if self.fault is not None:
            raise self.fault
        own = copy.deepcopy(model)
        if self.is_fast:
            own._forward_pre_hooks.clear()
        if self.compiles:
            seen: set[torch.Size] = set()

            def compile_once(_: Any, args: Any, inputs: dict[str, Any]) -> None:
                shape = inputs["input_ids"].shape
                if shape not in seen:
                    seen.add(shape)
                    time.sleep(0.2)

            own.register_forward_pre_hook(compile_once, with_kwargs=True)
        with torch.no_grad():
            for weight in own.classifier.parameters():
                weight.mul_(self.scale)
        return own


def slow_model() -> Any:
    model = tiny_model("bert").eval()
    model.register_forward_pre_hook(lambda *_: time.sleep(DELAY_MS / 1e3))
    return model


def find(models: dict[str, nn.Module], *forms: Any, **options: Any) -> fastest.FastestForms:
    sizes = options.pop("batch_sizes", (1, 3))
    return find_fastest(models, ROUNDS, batch_sizes=sizes, seq_len=8, forms=forms, **options)


def test_the_fastest_form_that_answers_alike_is_taken() -> None:
    models = {"teacher": slow_model(), "student": slow_model()}
    steps: list[tuple[int, int]] = []
    found = find(
        models,
        MadeUp("same-slow", is_fast=False),
        MadeUp("other-fast", scale=1.2),
        MadeUp("near-fast", scale=1.03),
        MadeUp("absent-fast", fault=ConversionError("it has no such form")),
        MadeUp("broken-fast", fault=RuntimeError("a kernel is missing\nat 0x0")),
        progress=lambda done, total: steps.append((done, total)),
    )
    for by_size in found.by_model.values():
        assert list(by_size) == [1, 3]
        for one in by_size.values():
            assert one.form == "near-fast"
            assert one.error == pytest.approx(0.03, abs=1e-3)
            assert one.latency.low_ms < DELAY_MS
            assert len(one.latency.times_ms) == 4
    assert found.left_out == (
        "other-fast of teacher, student: its answers are 0.2 of their length away from those of "
        "eager-fp32, and at most 0.1 is rounding",
        "absent-fast of teacher, student: it has no such form",
        "broken-fast of teacher, student: it failed with RuntimeError: a kernel is missing",
    )
    assert steps[:12] == [(number, 12) for number in range(1, 13)]
    assert steps[12:] == [(1, 2), (2, 2)] * 2


def test_a_form_that_compiles_at_its_first_pass_is_judged_by_the_others() -> None:
    found = find({"": slow_model()}, MadeUp("compiled-fast", compiles=True))
    assert {one.form for one in found.by_model[""].values()} == {"compiled-fast"}


def test_few_passes_are_made_of_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "LONG_MS", DELAY_MS / 2)
    model = slow_model()
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    rounds = Rounds(5, least=3, budget_s=0.0, repeats=4)
    found = find_fastest({"": model}, rounds, batch_sizes=(1,), seq_len=8, forms=())
    assert len(found.by_model[""][1].latency.times_ms) == 2
    # One for its answers, one to screen it, and one in each of two rounds.
    assert len(passes) == 4


def test_a_model_may_be_the_fastest_as_it_is() -> None:
    model = tiny_model("bert").eval()
    found = find({"": model}, MadeUp("slow", is_fast=False), ORACLE, batch_sizes=(1,))
    assert found.left_out == ()
    assert found.by_model[""][1].error == 0 or found.by_model[""][1].form == "slow"


def test_answers_that_are_no_numbers_are_left_out() -> None:
    found = find({"": slow_model()}, MadeUp("nan-fast", scale=float("nan")))
    assert {one.form for one in found.by_model[""].values()} == {"eager-fp32"}
    assert "nan-fast of : its answers are nan" in found.left_out[0]


def test_forms_are_not_tried_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr(fastest.psutil, "virtual_memory", Full)
    found = find({"": slow_model()}, MadeUp("same-fast"), batch_sizes=(1,))
    assert found.by_model[""][1].form == "eager-fp32"
    assert "it was not tried, since 0.0 GiB of memory are free" in found.left_out[0]


def test_every_form_there_is_serves_teachers_and_students() -> None:
    models: dict[str, nn.Module] = {
        "teacher": tiny_model("bert").eval(),
        "student": student(router="token_gate").eval(),
    }
    found = find_fastest(models, Rounds(1), batch_sizes=(1, 2), seq_len=8)
    for name, by_size in found.by_model.items():
        for one in by_size.values():
            assert one.error <= fastest.TOLERANCE, name
    assert all(not model.training for model in models.values())


def test_a_form_that_one_model_lacks_is_said_of_it_alone() -> None:
    merged = student(router="merged_sequence", method="full_copy", expert_size=32, num_shared=0)
    found = find_fastest(
        {"teacher": tiny_model("bert").eval(), "student": merged.eval()},
        Rounds(1),
        batch_sizes=(1,),
        seq_len=8,
    )
    said = [line for line in found.left_out if line.startswith("lean-fp32")]
    assert len(said) == 1
    assert said[0].startswith("lean-fp32 of student: ")
    assert "merges its experts, which has no lean form" in said[0]


def test_the_error_is_of_the_length_of_all_answers() -> None:
    expected = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    found = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert relative_error(found, expected) == pytest.approx(0.1)
    assert relative_error(expected, expected) == 0
    assert relative_error([torch.ones(2)], [torch.zeros(2)]) == float("inf")


def test_of_large_answers_a_part_is_compared() -> None:
    class Wide(nn.Module):
        config = None

        def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.arange(4.0 * MAX_COMPARED).view(4, -1),)

    answer, _ = fastest._timed_answer(Wide(), {"input_ids": torch.zeros(1)})
    assert MAX_COMPARED / 2 < len(answer) <= MAX_COMPARED
    assert answer[-1] > 3.9 * MAX_COMPARED


def test_a_speedup_is_of_low_quantiles_and_says_how_sure_it_is() -> None:
    other = Latency((10.0, 12.0, 11.0, 20.0, 21.0, 30.0))
    own = Latency((5.0, 6.0, 7.0, 20.0, 22.0, 25.0))
    found = Speedup.between(other, own)
    assert found.value == pytest.approx(other.low_ms / own.low_ms)
    assert found.high == pytest.approx(10.2 / 5.2)
    assert found.low == pytest.approx(20.2 / 20.4)
    assert Speedup.between(Latency((4.0,)), Latency((2.0,))) == Speedup(2.0, 2.0, 2.0)
