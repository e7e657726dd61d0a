"""What the page on kinds of tokens says of sizes is what the tool counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_dist.config import load_config
from moe_dist.measure.profile import count_parameters, flops_per_token
from moe_dist.moe import MoELayer
from pipelines.checks.sizes import convert_skeleton
from tests.docs.tables import Table, name_of, read_tables

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "kinds.md"
STORED, FLOPS = "stored parameters", "FLOPs/token"
DENSE = {"1/4": "dense_quarter", "1/8": "dense", "1/16": "dense_sixteenth"}
DENSE["1/32"] = "dense_thirty_second"
MIXTURES = {"1/8": "", "1/16": "sixteenth", "1/32": "thirty_second"}
LABELS = {"dense": DENSE, "mixture of 16": MIXTURES}


def minilm() -> Any:
    """The teacher of the recipe by its published shape, without its weights."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    with torch.device("meta"):
        return BertForSequenceClassification(config).eval()


def headline() -> Table:
    (table,) = (
        table
        for table in read_tables(PAGE)
        if STORED in [name_of(column) for column in table.columns]
    )
    return table


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str], Any]:
    """Each row's model by share of the FFN and kind."""
    config = load_config(ROOT / "pipelines" / "recipes" / "ablation_kinds.yaml")
    teacher = minilm()
    built = {("1", "teacher"): teacher}
    for kind, labels in LABELS.items():
        for share, label in labels.items():
            own = config.resolve_comparison(label) if label else config
            built[share, kind] = convert_skeleton(teacher, own)
    return built


def test_the_headline_table_has_what_the_tool_counts(
    models: dict[tuple[str, str], nn.Module],
) -> None:
    table = headline()
    columns = [name_of(column) for column in table.columns]
    rows = {(row[0].rstrip("*"), row[1]): row for row in table.rows}
    assert rows.keys() == models.keys()
    for key, model in models.items():
        stored, flops = count_parameters(model).total, flops_per_token(model, seq_len=64).total
        found = [rows[key][columns.index(name)] for name in (STORED, FLOPS)]
        assert found == [f"{stored / 1e6:.1f} M", f"{flops / 1e6:.1f} M"], key


def test_the_costs_that_the_text_names(models: dict[tuple[str, str], nn.Module]) -> None:
    """Gates beside FFNs, and what a mixture stores beside teacher and dense student."""
    gates: list[int] = []
    for share in MIXTURES:
        model = models[share, "mixture of 16"]
        routers = nn.ModuleList(
            layer.router
            for layer in model.modules()
            if isinstance(layer, MoELayer) and layer.router is not None
        )
        gate_flops = 2 * count_parameters(routers).total
        gates.append(round(100 * gate_flops / flops_per_token(model, seq_len=64).ffn))
    mixture, dense = (
        count_parameters(models["1/8", kind]).total for kind in ("mixture of 16", "dense")
    )
    assert mixture / count_parameters(models["1", "teacher"]).total == pytest.approx(
        4 / 3, abs=0.02
    )
    text = " ".join(PAGE.read_text().split())
    assert f"cost {gates[0]}, {gates[1]} and {gates[2]} % of what its FFNs do" in text
    assert f"{100 * (mixture / dense - 1):.0f} % more than the dense student" in text
