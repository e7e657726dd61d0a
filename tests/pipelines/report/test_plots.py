"""Pictures are written whole, from ordinary and from odd figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.metric_log import MetricRecord
from pipelines.report import plots

PNG = b"\x89PNG\r\n\x1a\n"


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 5000


def long_tailed_scores(num_layers: int, num_neurons: int = 1536) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        generator.lognormal(sigma=1.0 + 0.15 * layer, size=num_neurons).astype(np.float32)
        for layer in range(num_layers)
    ]


def training_records(num_steps: int = 300) -> list[MetricRecord]:
    generator = np.random.default_rng(0)
    records = []
    for step in range(1, num_steps + 1):
        noise = 1 + 0.25 * generator.standard_normal()
        terms = {
            "task": 0.3 + 0.4 * math.exp(-step / 60) * noise,
            "hidden_mse": (4 * math.exp(-step / 50) + 1) * noise,
            "prediction_kl": (0.2 * math.exp(-step / 40) + 0.02) * abs(noise),
        }
        metrics = {f"train/loss/{name}": value for name, value in terms.items()}
        metrics["train/loss/total"] = sum(terms.values())
        if step % 100 == 0:
            metrics |= {"dev/accuracy": 0.8 + step / 6000, "dev/f1": 0.78 + step / 7000}
        records.append(MetricRecord(step, float(step), metrics))
    return records


def expert_loads(num_layers: int, num_experts: int) -> dict[str, list[float]]:
    shares = np.random.default_rng(0).dirichlet([20.0] * num_experts, size=num_layers)
    return {f"bert.encoder.layer.{n}.intermediate": list(row) for n, row in enumerate(shares)}


@pytest.mark.parametrize("num_layers", [1, 6, 24])
def test_importance(num_layers: int, tmp_path: Path) -> None:
    path = tmp_path / "plots" / "importance.png"
    plots.plot_importance(long_tailed_scores(num_layers), path, num_kept=768, num_shared=256)
    assert is_picture(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["importance.png"]


def test_importance_of_neurons_that_do_nothing(tmp_path: Path) -> None:
    path = plots.plot_importance([np.zeros(8)], tmp_path / "zero.png", num_kept=8)
    assert is_picture(path)


def test_importance_takes_tensors(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = plots.plot_importance([torch.arange(16.0)] * 2, tmp_path / "tensors.png", num_kept=4)
    assert is_picture(path)


def test_losses(tmp_path: Path) -> None:
    assert is_picture(plots.plot_losses(training_records(), tmp_path / "losses.png"))


@pytest.mark.parametrize(
    "records",
    [
        [],
        [MetricRecord(1, 0.0, {"train/loss/task": 0.5, "train/loss/total": 0.5})],
        [MetricRecord(n, 0.0, {"train/loss/total": math.nan}) for n in range(30)],
        [MetricRecord(1, 0.0, {"dev/accuracy": 0.5})],
    ],
    ids=["empty", "one step", "all NaN", "dev only"],
)
def test_losses_of_odd_logs(records: list[MetricRecord], tmp_path: Path) -> None:
    assert is_picture(plots.plot_losses(records, tmp_path / "losses.png"))


@pytest.mark.parametrize(("num_layers", "num_experts"), [(6, 4), (12, 16), (24, 64), (1, 1)])
def test_expert_load(num_layers: int, num_experts: int, tmp_path: Path) -> None:
    path = plots.plot_expert_load(expert_loads(num_layers, num_experts), tmp_path / "load.png")
    assert is_picture(path)


def test_expert_load_of_unequal_layers(tmp_path: Path) -> None:
    loads = {"encoder.block.0": [0.5, 0.5], "decoder.block.1": [0.2, 0.3, 0.5]}
    assert is_picture(plots.plot_expert_load(loads, tmp_path / "load.png"))
    assert is_picture(plots.plot_expert_load({}, tmp_path / "none.png"))


def test_layer_names_are_short() -> None:
    assert plots.short_layer_name("bert.encoder.layer.3.intermediate") == "encoder 3"
    assert plots.short_layer_name("transformer.h.11.mlp") == "11"
    assert plots.short_layer_name("transformer.h.11.mlp.out") == "11 out"
    assert plots.short_layer_name("bert.encoder.layer.3.in") == "encoder 3 in"
    assert plots.short_layer_name("moe") == "moe"


def test_smoothing_keeps_constant_series() -> None:
    assert plots._smooth([2.0] * 50) == pytest.approx([2.0] * 50)


def test_no_expert_is_said_to_have_less_than_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []

    def keep(figure: Any, path: Path) -> Path:
        figures.append(figure)
        return path

    monkeypatch.setattr(plots, "save_figure", keep)
    plots.plot_expert_load({"encoder.block.0": [0.9, 0.1, 0.0, 0.0]}, tmp_path / "load.png")
    heat_map, bar = figures[0].axes
    low, high = bar.get_ylim()
    assert (low, high) == pytest.approx((0.0, 3.6))
    assert heat_map.images[0].norm(1.0) == pytest.approx(0.5)


def test_perplexities_have_a_scale_of_factors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[str] = []
    save = plots.save_figure

    def watched(figure: Any, path: Path) -> Path:
        scales.append(figure.axes[1].get_yscale())
        return save(figure, path)

    monkeypatch.setattr(plots, "save_figure", watched)
    for name, values in (("perplexity", (183.0, 60.0, 8.0)), ("accuracy", (0.02, 0.5, 0.9))):
        records = [
            MetricRecord(step, float(step), {"train/loss/total": 1.0, f"dev/{name}": value})
            for step, value in enumerate(values, 1)
        ]
        plots.plot_losses(records, tmp_path / "losses.png")
    assert scales == ["log", "linear"]
