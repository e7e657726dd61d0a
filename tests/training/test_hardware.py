"""Device, precision, batches on their way, and the log window."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_dist.conversion.families import half_fault
from moe_dist.distributed import launch
from moe_dist.errors import ClusterError, TrainingError
from moe_dist.training import hardware
from moe_dist.training.hardware import (
    peak_device_memory_gib,
    peak_memory_gib,
    pick_device,
    pick_precision,
    return_free_memory,
)
from moe_dist.training.metric_window import LogWindow, load_imbalance
from moe_dist.training.transfer import ahead, prepared
from tests.conversion.dense_models import tiny_model

CPU = torch.device("cpu")


def test_auto_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        assert pick_precision("auto", CPU) == expected
        assert pick_precision("fp32", CPU) == "fp32"
        assert pick_precision("bf16", CPU) == "bf16"


def test_a_model_that_cannot_compute_in_bf16_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "_is_fast_at_bf16", lambda device: True)
    assert pick_precision("auto", CPU, "it overflows") == "fp32"
    assert "computes in fp32: it overflows" in caplog.text
    assert pick_precision("fp32", CPU, "it overflows") == "fp32"
    with pytest.raises(TrainingError, match="it overflows"):
        pick_precision("bf16", CPU, "it overflows")


def test_models_of_deberta_are_such(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bfloat16" in half_fault(tiny_model("deberta"))
    assert not half_fault(tiny_model("deberta-v2")) and not half_fault(torch.nn.Linear(1, 1))


def test_answers_are_in_half_precision_on_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    chosen: list[str] = []
    monkeypatch.setattr(
        hardware, "precision_context", lambda precision, device: chosen.append(precision)
    )
    gpu = torch.device("cuda", 0)
    hardware.answering(CPU)
    hardware.answering(gpu)
    hardware.answering(gpu, "it overflows")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    hardware.answering(gpu)
    assert chosen == ["fp32", "bf16", "fp32", "fp32"]


def test_memory_of_a_gpu_is_what_tensors_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    begun: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", begun.append)
    for device in (CPU, torch.device("cuda", 0)):
        hardware.begin_peak_device_memory(device)
    assert begun == [torch.device("cuda", 0)]
    assert peak_device_memory_gib(CPU) is None
    assert peak_device_memory_gib(torch.device("cuda", 0)) == 1.5


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (4, 2)])
def test_a_process_takes_a_gpu_that_it_sees(
    visible: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(launch.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(launch.dist, "init_process_group", lambda *_, **__: None)
    assert launch.training_device() == torch.device("cuda", expected)
    launch.ensure_process_group()
    assert chosen == [expected]


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware.torch.cuda, "is_available", lambda: False)
    assert pick_device(False) == pick_device("auto") == CPU
    with pytest.raises(ClusterError, match="no GPU"):
        pick_device(True)


def test_peak_memory_is_that_of_a_process_with_torch() -> None:
    assert 0.05 < peak_memory_gib() < 64


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def resident_mib() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

    # Too small for pages of their own, and the last one holds the heap's end.
    pieces = [torch.ones(4000) for _ in range(8000)]
    del pieces[:-1]
    held = resident_mib()
    return_free_memory()
    assert resident_mib() < held - 60


def test_batches_pass_unchanged_on_a_cpu() -> None:
    batches = [{"x": torch.tensor([i])} for i in range(3)]
    assert [int(batch["x"]) for batch in ahead(iter(batches), CPU)] == [0, 1, 2]


def test_items_are_prepared_ahead_and_in_order_for_a_gpu() -> None:
    seen = list(prepared(iter([1, 2, 3]), lambda item: item * 10, torch.device("cuda")))
    assert seen == [10, 20, 30]


def test_a_fault_in_the_next_batch_reaches_the_caller() -> None:
    def items() -> object:
        yield 1
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        list(prepared(items(), lambda item: item, torch.device("cuda")))


def test_load_imbalance_is_largest_over_mean() -> None:
    assert load_imbalance(torch.tensor([3.0, 1.0, 0.0, 0.0])) == 3.0
    assert load_imbalance(torch.tensor([2.0, 2.0])) == 1.0
    assert load_imbalance(torch.zeros(4)) == 1.0


def test_a_restored_window_goes_on_exactly() -> None:
    def fill(window: LogWindow, first: int, last: int) -> None:
        for step in range(first, last):
            loss = torch.tensor(0.1 * (step + 1))
            sums = torch.tensor([step, 2.0, 1.0, 4.0])
            loads = {"layer": torch.tensor([step, 1.0])}
            window.add_micro_batch({"task": loss}, loads, routing_sums={"layer": sums})
            window.add_step(grad_norm=float(step), num_tokens=10, seconds=0.5)

    whole, first, second = LogWindow(CPU), LogWindow(CPU), LogWindow(CPU)
    fill(whole, 0, 5)
    fill(first, 0, 2)
    second.restore(first.state(), keeps_sums=True)
    fill(second, 2, 5)
    assert second.metrics() == whole.metrics()
    assert whole.metrics()["perf/tokens_per_s"] == pytest.approx(20.0)
    assert whole.metrics()["train/grad_norm"] == 2.0
    assert whole.metrics()["moe/load_imbalance/layer"] == pytest.approx(10 / 7.5)
    assert whole.metrics()["moe/entropy/layer"] == pytest.approx(1.0)
    assert whole.metrics()["moe/dropped/layer"] == pytest.approx(0.25)
    other_rank = LogWindow(CPU)
    other_rank.restore(first.state(), keeps_sums=False)
    assert other_rank.metrics()["train/loss/task"] == 0.0
    whole.clear()
    assert whole.metrics() == {}


def test_an_engine_trains_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dist.distributed.engine import build_engine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    engine = build_engine(
        torch.nn.Linear(2, 2),
        learning_rate=1e-3,
        weight_decay=0.0,
        num_steps=1,
        device=pick_device(False),
    )
    assert engine.device == torch.device("cpu")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that keeps memory")
def test_what_a_step_gives_back_is_there_for_the_next_one() -> None:
    program = """if True:
        import resource, sys, torch
        from moe_dist.training.hardware import keep_free_memory
        if sys.argv[1] == "keep":
            keep_free_memory()
        def step():
            return [torch.ones(4 * 2**20) for _ in range(10)]
        step()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", program, how])) for how in ("keep", "")
    )
    assert kept < 0.2 * returned
