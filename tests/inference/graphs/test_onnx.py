"""ONNX graphs answer as the model does, on texts of which none was there when they were traced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference import save_model
from moe_dist.inference.backends import Form
from moe_dist.inference.graphs import onnx_weights as weights
from moe_dist.inference.graphs.nearness import measure_nearness, trial_batches
from moe_dist.inference.graphs.onnx_graph import write_graph
from moe_dist.inference.graphs.onnx_session import open_graph, open_session
from moe_dist.inference.graphs.traceable_ffn import TraceableFFN
from moe_dist.moe.layer import moe_layers
from moe_dist.moe.routing import use_task
from tests.conversion.dense_models import (
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)
from tests.inference.graphs.traced_students import (
    POOLED,
    check_that_experts_follow_the_data,
    hashed_student,
    student,
)

INT8_TOLERANCE = 0.2
"""Of the largest output of a random model of 16 wide, where experts are chosen alike."""


@pytest.fixture(scope="module")
def hashed() -> Any:
    return hashed_student()


@pytest.fixture(scope="module")
def graph(hashed: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    return path, write_graph(hashed, path)


def test_experts_follow_the_data(hashed: Any, graph: tuple[Path, Any]) -> None:
    """Traced with a text of one expert; answers those of the others, and of all of them mixed."""
    onnx = open_graph(hashed, *graph)
    assert measure_nearness(hashed, onnx).largest < 1e-5
    check_that_experts_follow_the_data(hashed, onnx)


@pytest.mark.parametrize(
    "make",
    [
        lambda: student(
            kind="ForQuestionAnswering",
            router="token_gate",
            top_k=2,
            expert_size=10,
            num_shared=0,
        ),
        lambda: student(kind="Model", router="sentence_gate", config=POOLED),
        lambda: student("llama", "ForSequenceClassification", router="token_gate"),
    ],
    ids=["top-2", "sentences", "gated"],
)
def test_every_kind_of_routing(make: Callable[[], Any]) -> None:
    model = make()
    assert measure_nearness(model, Form("onnx").prepare(model)).largest < 1e-4


def test_layers_without_a_choice_or_neurons() -> None:
    """What is traced is computed alike; no export is needed to see it."""
    for options in (
        {"router": "token_gate", "expert_size": 32, "num_shared": 32},
        {"router": "token_gate", "gate_scale": "probability"},
    ):
        layer = moe_layers(student(**options))[0]
        hidden = torch.randn(3, 5, 16)
        with torch.no_grad():
            torch.testing.assert_close(TraceableFFN(layer)(hidden), layer(hidden))


def test_several_tasks_in_one_graph() -> None:
    """Each call names its task, for the routers and for the head."""
    model = student(
        kind="ForSequenceClassification",
        router="task_gate",
        num_tasks=2,
        config={"num_labels": 5},
    )
    set_heads(model, [TaskHead("a", ("no", "yes")), TaskHead("b", ("x", "y", "z"))])
    onnx = Form("onnx").prepare(model)
    for task in (0, 1):
        with use_task(task):
            torch.testing.assert_close(
                logits_of(onnx, token_batch(3)), logits_of(model, token_batch(3))
            )
    with pytest.raises(MissingInputError, match="names none"):
        logits_of(onnx, token_batch(3))


def test_int8_holds_the_experts_too(hashed: Any, graph: tuple[Path, Any], tmp_path: Path) -> None:
    import onnx

    path, spec = graph
    target = tmp_path / "int8.onnx"
    found = weights.quantize(path, target)
    assert found == weights.count_bytes(target)
    num_weights = sum(one.numel() for one in hashed.parameters() if one.dim() > 1)
    assert num_weights <= found.int8 < num_weights + 1000
    in_fp32 = [
        one.name
        for one in onnx.load(target).graph.initializer
        if one.data_type == onnx.TensorProto.FLOAT and len(one.dims) > 1
    ]
    assert all(name.endswith("_scale_of_row") for name in in_fp32)
    assert weights.count_bytes(path).int8 == 0
    near = measure_nearness(hashed, open_graph(hashed, target, spec))
    assert 0 < near.mean < near.largest < INT8_TOLERANCE


def test_weights_that_a_quantizer_passes_over_are_an_error(
    graph: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime.quantization as library

    whole = library.quantize_dynamic
    monkeypatch.setattr(
        library,
        "quantize_dynamic",
        lambda *args, **options: whole(
            *args,
            **options | {"nodes_to_exclude": [f"node_{name}" for name in _products(graph[0])]},
        ),
    )
    with pytest.raises(ConversionError, match=r"leaves \d+ weights in float32"):
        weights.quantize(graph[0], tmp_path / "int8.onnx")


def _products(path: Path) -> list[str]:
    import onnx

    nodes = onnx.load(path).graph.node
    return [one.name.removeprefix("node_") for one in nodes if one.op_type == "MatMul"]


def test_a_graph_names_no_directory_of_this_machine(graph: tuple[Path, Any]) -> None:
    content = graph[0].read_bytes()
    for place in (Path(torch.__file__).parent.parent, Path(__file__).parents[3]):
        assert str(place).encode() not in content


def test_sessions_have_as_many_threads_as_torch(graph: tuple[Path, Any]) -> None:
    before = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            options = open_session(graph[0]).get_session_options()
            assert options.intra_op_num_threads == number
    finally:
        torch.set_num_threads(before)


def test_the_form_refuses_what_a_graph_cannot_do(
    hashed: Any, graph: tuple[Path, Any], tmp_path: Path
) -> None:
    onnx = open_graph(hashed, *graph)
    assert type(onnx).__name__ == type(hashed).__name__
    batch = next(trial_batches(hashed))
    plain = onnx(**batch, return_dict=False)
    torch.testing.assert_close(plain[0], onnx(batch["input_ids"]).logits)
    for error, said, act in (
        (MissingInputError, "given no input_ids", lambda: onnx(inputs_embeds=None)),
        (MissingInputError, "output_attentions", lambda: onnx(**batch, output_attentions=True)),
        (
            MissingInputError,
            "attention_mask of the shape",
            lambda: onnx(batch["input_ids"], torch.ones(1, 1, 1, 1)),
        ),
        (MissingInputError, "no tokens", lambda: onnx(torch.ones(1, 0, dtype=torch.int64))),
        (
            MissingInputError,
            "no tokens",
            lambda: onnx(torch.ones(2, 2).long(), torch.tensor([[1, 1], [0, 0]])),
        ),
        (ConversionError, "no cache to write", lambda: onnx.generate(**batch)),
        (ConversionError, "ONNX form cannot learn", lambda: onnx.train()),
        (ConversionError, "ONNX form cannot be saved", lambda: save_model(onnx, tmp_path / "m")),
        (ConversionError, "ONNX form cannot be prepared twice", lambda: Form().prepare(onnx)),
    ):
        with pytest.raises(error, match=said):
            act()


def test_what_has_no_graph_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model("bert")
    plan = plan_partition(
        random_scores(model),
        num_experts=2,
        expert_size=32,
        num_shared_neurons=0,
        method="full_copy",
    )
    merged = dense_to_moe(model, plan, router="merged_sequence")
    with pytest.raises(ConversionError, match=r"merges its experts[^$]*--average"):
        Form("onnx").prepare(merged)
    with pytest.raises(ConversionError, match="token by token"):
        Form("onnx").prepare(tiny_model("t5"))
    with pytest.raises(ConversionError, match="'bf16' is not one of fp32, int8"):
        Form.parse("onnx-bf16")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingInputError, match="onnxruntime") as found:
        Form("onnx").prepare(model)
    assert "pip install 'moe-dist[onnx]'" in str(found.value)
