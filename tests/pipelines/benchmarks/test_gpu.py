"""The page of a GPU's figures: every table is measured, and none is written without one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moe_dist.errors import ConfigError, ConversionError
from pipelines.benchmarks import gpu as gpu_module
from pipelines.benchmarks.gpu import GpuBenchmark, GpuReport, count_waits, main, run, to_markdown
from pipelines.benchmarks.layer import LayerTiming

TINY = GpuBenchmark(
    num_tokens=16,
    layer_width=16,
    layers=((2, 1),),
    num_repeats=2,
    batch_size=2,
    seq_len=8,
    d_model=32,
    num_layers=1,
)


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(GpuBenchmark(out=tmp_path / "gpu.md"))
    assert "no CUDA device here" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_layers_and_steps_are_measured() -> None:
    report = run(TINY, torch.device("cpu"))
    assert [timing.layer for timing in report.layers["2 experts, top 1"]] == [
        "dense",
        "hash_random",
        "token_gate",
    ]
    assert [step.precision for step in report.steps] == ["fp32", "bf16"]
    assert all(step.tokens_per_s > 0 and step.peak_gib is None for step in report.steps)
    with pytest.raises(ConfigError, match="num_repeats is 0"):
        run(GpuBenchmark(num_repeats=0), torch.device("cpu"))


def test_the_most_memory_of_steps_is_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers and other steps were measured before, in the same process."""
    done: list[str] = []
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append("reset"))
    monkeypatch.setattr(gpu_module, "random_classifier", lambda **sizes: done.append("model"))
    with pytest.raises(ConversionError, match="no feed-forward networks"):
        gpu_module._time_steps(TINY, "bf16", cast(torch.device, gpu))
    assert done == ["reset", "model"]


def test_the_page_has_every_figure() -> None:
    timing = LayerTiming("bf16", "token_gate", 1.25, 1.0, 1.5)
    report = GpuReport("a GPU", {"8 experts, top 2": [timing]}, {"token_gate": (0, 3)}, [])
    page = to_markdown(report, TINY)
    assert page.startswith("# On a GPU\n\na GPU. Written by")
    assert "| 8 experts, top 2 | token_gate | 1.250 | 1.000 | 1.50 |" in page
    assert "| token_gate | 0 | 3 |" in page
    assert max(map(len, page.splitlines())) <= 120


@pytest.mark.gpu
@pytest.mark.parametrize("router", ["hash_random", "token_gate"])
def test_a_layer_does_not_keep_the_host_waiting(router: str) -> None:
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device)[0] not in (9, 10):
        pytest.skip("torch multiplies groups in one kernel on Hopper and Blackwell only")
    assert count_waits(router, device) == (0, 0)
