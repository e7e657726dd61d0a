"""Which texts go together, and what happens to those that wait."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from moe_dist.serving.batching import (
    BatchFacts,
    BatchQueue,
    CallCost,
    in_thread,
    next_batch,
    plan_batches,
)


def all_partitions(places: list[int], most: int) -> Iterator[list[list[int]]]:
    """Every way to split a few texts into batches: the slow oracle."""
    if not places:
        yield []
        return
    first, *rest = places
    for others in (c for n in range(most) for c in itertools.combinations(rest, n)):
        left = [place for place in rest if place not in others]
        for batches in all_partitions(left, most):
            yield [[first, *others], *batches]


def total(batches: Sequence[Sequence[int]], lengths: Sequence[int], cost: CallCost) -> float:
    read = [[lengths[place] for place in own] for own in batches]
    return sum(cost.of(len(own), max(own), sum(own)) for own in read)


@pytest.mark.parametrize("overhead", [0.0, 5.0, 40.0, 1e6])
@pytest.mark.parametrize("most", [1, 2, 3, 6])
@pytest.mark.parametrize("padding_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("lengths", [[7], [3, 90, 4, 5, 88, 30], [9, 9, 9, 9, 9], [1, 50, 2]])
def test_no_other_batches_cost_less(
    lengths: list[int], padding_share: float, most: int, overhead: float
) -> None:
    cost = CallCost(overhead, padding_share)
    found = plan_batches(lengths, most, cost)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert max(map(len, found)) <= most
    best = min(
        total(batches, lengths, cost) for batches in all_partitions(list(range(len(lengths))), most)
    )
    assert total(found, lengths, cost) == pytest.approx(best)


def test_what_a_call_costs_decides_between_padding_and_one_more_call() -> None:
    lengths = [10, 100, 12, 98]
    assert plan_batches(lengths, 8, CallCost(20)) == [[0, 2], [3, 1]]
    # 2 × 88 padded positions cost less than a call of 200.
    assert plan_batches(lengths, 8, CallCost(200)) == [[0, 2, 3, 1]]
    assert plan_batches([], 8, CallCost(20)) == []
    # A model that leaves padding out takes all at once.
    assert plan_batches(lengths, 8, CallCost(20, padding_share=0)) == [[0, 2, 3, 1]]


def test_the_oldest_go_first_where_that_costs_no_more() -> None:
    lengths = [5, 90, 6, 80, 7, 70]
    free, dear = CallCost(20, padding_share=0), CallCost(20, padding_share=1)
    assert next_batch(lengths, 4, free) == [0, 1, 2, 3]
    assert next_batch(lengths, 4, dear) == [0, 2, 4]
    assert next_batch(lengths, 6, free) == [0, 2, 4, 5, 3, 1]
    assert next_batch([9] * 6, 4, dear) == [0, 1, 2, 3]


class Calls:
    """A model that notes what it is given, and waits until it may answer."""

    def __init__(self) -> None:
        self.columns: list[list[list[str]]] = []
        self.may_answer = threading.Event()
        self.began = threading.Event()

    def __call__(self, columns: list[list[str]]) -> list[dict[str, Any]]:
        self.columns.append(columns)
        self.began.set()
        assert self.may_answer.wait(20)
        if any("bad" in text for text in columns[0]):
            raise ValueError("bad text")
        return [{"said": " ".join(row)} for row in zip(*columns, strict=True)]


def queue(calls: Calls, **changes: Any) -> BatchQueue:
    values: dict[str, Any] = {
        "cost": CallCost(20),
        "max_batch_size": 4,
        "max_wait_s": 0.0,
    } | changes
    return BatchQueue(in_thread(calls, ThreadPoolExecutor(1)), **values)


def rows(*texts: str) -> list[tuple[tuple[str, ...], int]]:
    return [((text,), len(text)) for text in texts]


async def begun(calls: Calls) -> None:
    while not calls.began.is_set():
        await asyncio.sleep(0.001)


def test_texts_of_many_requests_share_a_call_and_each_gets_its_own_answers() -> None:
    calls, facts = Calls(), list[BatchFacts]()

    async def act() -> list[Any]:
        own = queue(calls, on_batch=facts.append)
        first = asyncio.create_task(own.submit(rows("first")))
        await begun(calls)
        others = [
            asyncio.create_task(own.submit(rows(*texts)))
            for texts in (("abc", "y" * 90), ("defg",), ("z" * 88,))
        ]
        await asyncio.sleep(0.02)
        calls.may_answer.set()
        return [await first, *(await asyncio.gather(*others))]

    found = asyncio.run(act())
    assert [[answer["said"] for answer in own] for own in found] == [
        ["first"],
        ["abc", "y" * 90],
        ["defg"],
        ["z" * 88],
    ]
    # The short ones together, and the long ones.
    assert calls.columns == [[["first"]], [["abc", "defg"]], [["z" * 88, "y" * 90]]]
    assert facts == [BatchFacts(1, 5, 0), BatchFacts(2, 7, 1), BatchFacts(2, 178, 2)]


def test_the_oldest_text_does_not_wait_for_ever() -> None:
    """Texts of another length come all the time, and the old one is in the next call."""
    calls = Calls()

    async def act() -> None:
        own = queue(calls, max_batch_size=2)
        tasks = [asyncio.create_task(own.submit(rows("first")))]
        await begun(calls)
        for text in ("x" * 90, "a", "b", "c", "d"):
            tasks.append(asyncio.create_task(own.submit(rows(text))))
            await asyncio.sleep(0)
        calls.may_answer.set()
        await asyncio.gather(*tasks)

    asyncio.run(act())
    assert calls.columns[1] == [["x" * 90]]


def test_a_bad_text_fails_alone() -> None:
    calls = Calls()

    async def act() -> list[Any]:
        own = queue(calls)
        tasks = [asyncio.create_task(own.submit(rows("first")))]
        await begun(calls)
        tasks += [asyncio.create_task(own.submit(rows(text))) for text in ("good", "bad!", "fine")]
        await asyncio.sleep(0.02)
        calls.may_answer.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        # And the queue goes on.
        return [*found, await own.submit(rows("later"))]

    first, good, bad, fine, later = asyncio.run(act())
    assert isinstance(bad, ValueError)
    assert [own[0]["said"] for own in (first, good, fine, later)] == [
        "first",
        "good",
        "fine",
        "later",
    ]


def test_a_bad_text_costs_few_calls() -> None:
    calls = Calls()
    calls.may_answer.set()

    async def act() -> list[Any]:
        own = queue(calls, max_batch_size=32)
        texts = ["bad!" if place == 11 else f"text{place:02}" for place in range(32)]
        tasks = [own.submit([((text,), 6)]) for text in texts]
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(act())
    assert [place for place, own in enumerate(found) if isinstance(own, Exception)] == [11]
    # All, and then both halves of what failed: 1 + 2 * log2(32).
    assert len(calls.columns) == 11


@pytest.mark.parametrize("fault", [SystemExit(3), KeyboardInterrupt(), StopIteration()])
def test_nobody_waits_for_a_model_that_ended(fault: BaseException) -> None:
    def end(columns: Any) -> Any:
        raise fault

    async def act() -> list[Any]:
        own = BatchQueue(in_thread(end, ThreadPoolExecutor(1)), CallCost(20), 4, 0.0)
        tasks = [own.submit(rows(text)) for text in ("one", "two", "three")]
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    found = asyncio.run(act())
    assert len(found) == 3
    for own in found:
        assert isinstance(own, RuntimeError) and f"ended with {fault!r}" in str(own)


@pytest.mark.parametrize("number", [0, 1, 5])
def test_a_wrong_number_of_answers_is_a_fault(number: int) -> None:
    async def act() -> Any:
        answers = [{"said": "a"}] * number
        own = BatchQueue(
            in_thread(lambda columns: answers, ThreadPoolExecutor(1)), CallCost(20), 4, 0.0
        )
        submit = own.submit([((text,), 3) for text in ("one", "two")])
        return await asyncio.wait_for(asyncio.gather(submit, return_exceptions=True), 20)

    (found,) = asyncio.run(act())
    if number == 1:  # Right for each of the halves.
        assert found == [{"said": "a"}] * 2
    else:
        assert isinstance(found, RuntimeError) and f"gave {number} answers to 1 texts" in str(found)


def test_a_worker_that_is_ended_leaves_nobody_waiting() -> None:
    calls = Calls()

    async def act() -> list[Any]:
        own = queue(calls)
        first = asyncio.create_task(own.submit(rows("first")))
        await begun(calls)
        second = asyncio.create_task(own.submit(rows("second")))
        await asyncio.sleep(0)
        assert own._worker is not None
        own._worker.cancel()
        found = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 20)
        calls.may_answer.set()
        return list(found)

    found = asyncio.run(act())
    assert all(isinstance(own, RuntimeError) and "queue ended" in str(own) for own in found)


def test_a_fault_in_counting_is_logged_and_the_queue_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = Calls()
    calls.may_answer.set()

    def fail(facts: BatchFacts) -> None:
        raise ValueError("no zero")

    async def act() -> list[Any]:
        own = queue(calls, on_batch=fail)
        return [await asyncio.wait_for(own.submit(rows(text)), 20) for text in ("one", "two")]

    assert asyncio.run(act()) == [[{"said": "one"}], [{"said": "two"}]]
    assert "no zero" in caplog.text


def test_texts_of_those_who_left_are_not_read() -> None:
    calls = Calls()

    async def act() -> None:
        own = queue(calls, max_batch_size=1)
        first = asyncio.create_task(own.submit(rows("first")))
        await begun(calls)
        gone = asyncio.create_task(own.submit(rows("gone")))
        stays = asyncio.create_task(own.submit(rows("stays")))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.sleep(0)
        calls.may_answer.set()
        await asyncio.gather(first, stays)

    asyncio.run(act())
    assert calls.columns == [[["first"]], [["stays"]]]


def test_pairs_and_single_texts_are_not_mixed() -> None:
    calls = Calls()

    async def act() -> list[Any]:
        own = queue(calls)
        first = asyncio.create_task(own.submit(rows("first")))
        await begun(calls)
        pair = asyncio.create_task(own.submit([(("a", "b"), 2)]))
        single = asyncio.create_task(own.submit(rows("c")))
        await asyncio.sleep(0.02)
        calls.may_answer.set()
        return list(await asyncio.gather(first, pair, single))

    found = asyncio.run(act())
    assert [own[0]["said"] for own in found] == ["first", "a b", "c"]
    assert calls.columns[1:] == [[["a"], ["b"]], [["c"]]]


def test_an_idle_model_waits_a_little_for_more() -> None:
    calls = Calls()
    calls.may_answer.set()

    async def act() -> None:
        own = queue(calls, max_wait_s=5.0, max_batch_size=3)
        tasks = []
        for text in ("abc", "abd", "abe"):
            tasks.append(asyncio.create_task(own.submit(rows(text))))
            await asyncio.sleep(0.01)
        # Full after three, and not after five seconds.
        await asyncio.wait_for(asyncio.gather(*tasks), 2)

    asyncio.run(act())
    assert calls.columns == [[["abc", "abd", "abe"]]]


def test_it_can_be_told_how_long_a_call_runs_and_when_the_last_one_ended() -> None:
    calls = Calls()

    async def act() -> None:
        own = queue(calls)
        assert own.call_s == 0 and not own.answered_within(100)
        task = asyncio.create_task(own.submit(rows("first")))
        await begun(calls)
        await asyncio.sleep(0.05)
        assert 0.03 < own.call_s < 10
        calls.may_answer.set()
        await task
        assert own.call_s == 0 and own.answered_within(100) and not own.answered_within(-1)
        assert await own.submit([]) == []

    asyncio.run(act())
