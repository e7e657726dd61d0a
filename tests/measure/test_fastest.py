"""A model's fastest form: found among those that answer alike, and why others are left out."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.errors import ConversionError
from moe_dist.inference.backends import ORACLE
from moe_dist.measure import fastest, free_memory, screening
from moe_dist.measure.fastest import Speedup, find_fastest
from moe_dist.measure.latency import Latency, OtherWork, Rounds
from moe_dist.measure.screening import MAX_COMPARED, relative_error, timed_answer
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
    lasts: int | None = None

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
        if self.lasts is not None:
            left = iter(range(self.lasts))

            def fail_later(*_: Any) -> None:
                if next(left, None) is None:
                    raise RuntimeError("out of memory\nsomewhere")

            own.register_forward_pre_hook(fail_later)
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
    monkeypatch.setattr(screening, "LONG_MS", DELAY_MS / 2)
    model = slow_model()
    passes: list[Any] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    rounds = Rounds(5, least=3, budget_s=0.0, repeats=4)
    found = find_fastest({"": model}, rounds, batch_sizes=(1,), seq_len=8, forms=())
    assert len(found.by_model[""][1].latency.times_ms) == 2
    # One for its answers, which is its screening as well, and one in each of two rounds.
    assert len(passes) == 3


def test_a_form_that_fails_while_it_is_timed_costs_no_figures() -> None:
    models = {"teacher": slow_model(), "student": tiny_model("bert").eval()}
    # An answer and two passes at each of two sizes are the screening.
    found = find(models, MadeUp("weak-fast", lasts=7))
    for by_size in found.by_model.values():
        assert [(size, one.form) for size, one in by_size.items()] == [
            (1, "eager-fp32"),
            (3, "eager-fp32"),
        ]
    assert found.by_model["teacher"][3].latency.low_ms >= DELAY_MS
    assert (
        "every form but eager-fp32 of teacher, student: at batch 1 a pass failed with "
        "RuntimeError: out of memory" in found.left_out
    )


def test_eager_is_timed_alone_where_its_own_first_pass_fails() -> None:
    model, fails = slow_model(), [True]

    def fail_once(*_: Any) -> None:
        if fails.pop() if fails else False:
            raise RuntimeError("no memory")

    model.register_forward_pre_hook(fail_once)
    found = find({"teacher": model}, MadeUp("same-fast"))
    assert {one.form for one in found.by_model["teacher"].values()} == {"eager-fp32"}
    assert found.left_out == (
        "every form but eager-fp32 of teacher: a pass in eager-fp32 failed with RuntimeError: no "
        "memory",
    )


def test_where_eager_fails_nothing_is_found() -> None:
    model = slow_model()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="a pass at batch 1 failed with RuntimeError: no memory"):
        find({"": model}, MadeUp("same-fast"))


def test_no_form_is_begun_when_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastest, "SEARCH_S", 0.0)
    models = {"teacher": slow_model(), "student": slow_model()}
    found = find(models, MadeUp("same-fast"), batch_sizes=(1,))
    assert {one[1].form for one in found.by_model.values()} == {"eager-fp32"}
    assert found.left_out == (
        "same-fast of teacher, student: it was not tried, since those before it took longer than "
        "0 s",
    )


def test_what_is_long_and_hopeless_at_a_small_batch_is_not_tried_at_a_larger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(screening, "LONG_MS", 100.0)
    shapes: list[int] = []
    model = tiny_model("bert").eval()

    class Slow(MadeUp):
        def prepare(self, model: Any) -> Any:
            own = super().prepare(model)

            def wait(_: Any, args: Any, inputs: dict[str, Any]) -> None:
                shapes.append(len(inputs["input_ids"]))
                time.sleep(1.5)

            own.register_forward_pre_hook(wait, with_kwargs=True)
            return own

    found = find({"": model}, Slow("slow"), batch_sizes=(3, 1))
    assert shapes == [1]
    assert "slow of : a pass at batch 1 took 1." in found.left_out[0]
    assert "more than 3 times as long as another form's" in found.left_out[0]


def test_other_work_is_watched_in_every_pass_and_not_while_forms_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_now, said = [0], []

    class Watch:
        @contextmanager
        def looking(self) -> Iterator[None]:
            open_now[0] += 1
            yield
            open_now[0] -= 1

        def found(self) -> OtherWork:
            return OtherWork(2, 0.7)

    class Looking(MadeUp):
        def prepare(self, model: Any) -> Any:
            said.append(("made", open_now[0]))
            return super().prepare(model)

    monkeypatch.setattr(fastest, "WorkWatch", Watch)
    model = tiny_model("bert").eval()
    model.register_forward_hook(lambda *_: said.append(("pass", open_now[0])))
    found = find({"": model}, Looking("same"))
    assert set(said) == {("made", 0), ("pass", 1)}
    assert found.other_work.busy_cores == 0.7


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

    monkeypatch.setattr(free_memory.psutil, "virtual_memory", Full)
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
            assert one.error <= screening.TOLERANCE, name
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

    answer, _ = timed_answer(Wide(), {"input_ids": torch.zeros(1)})
    # The rest of the answer is not kept alive by it.
    assert answer.untyped_storage().nbytes() == 4 * len(answer)
    assert MAX_COMPARED / 2 < len(answer) <= MAX_COMPARED
    assert answer[-1] > 3.9 * MAX_COMPARED


def test_a_speedup_is_of_low_quantiles_and_says_how_sure_it_is() -> None:
    other = Latency((10.0, 12.0, 11.0, 20.0, 21.0, 30.0))
    own = Latency((5.0, 6.0, 7.0, 20.0, 22.0, 25.0))
    found = Speedup.between(other, own)
    assert found.value == pytest.approx(other.low_ms / own.low_ms)
    assert found.high == pytest.approx(10.2 / 5.2)
    assert found.low == pytest.approx(20.2 / 20.4)
    assert found.half == 3
    assert Speedup.between(Latency((4.0,)), Latency((2.0,))) == Speedup(2.0, 2.0, 2.0, 0)
