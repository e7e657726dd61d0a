"""Programs of torch.export answer as the model does, and hold no more than they need."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion.heads import TaskHead, set_heads
from moe_dist.errors import ConversionError
from moe_dist.inference.graphs.torch_program import TorchExport, open_program
from moe_dist.inference.graphs.tracing import SENTENCE_VECTOR, trace
from moe_dist.moe.routing import use_task
from tests.conversion.dense_models import logits_of, tiny_model, token_batch
from tests.inference.graphs.traced_students import (
    POOLED,
    check_that_experts_follow_the_data,
    hashed_student,
    student,
)

MODELS = {
    "top-2": lambda: student(
        kind="ForQuestionAnswering", router="token_gate", top_k=2, expert_size=10, num_shared=0
    ),
    "sentences": lambda: student(kind="Model", router="sentence_gate", config=POOLED),
    "gated decoder": lambda: student("llama", "ForCausalLM", router="token_gate"),
    "two stacks": lambda: student("bart", "ForSequenceClassification", router="token_gate"),
    "dense": lambda: tiny_model("gpt2", "LMHeadModel").eval(),
}


@pytest.fixture(scope="module")
def hashed() -> Any:
    return hashed_student()


def test_experts_follow_the_data(hashed: Any, tmp_path: Path) -> None:
    """Traced with a text of one expert; answers those of the others, and of all of them mixed."""
    path = tmp_path / "model.pt2"
    written = TorchExport().write(hashed, "fp32", path)
    assert written.nearness.largest < 1e-5
    program = open_program(hashed, path, written.spec)
    check_that_experts_follow_the_data(hashed, program)


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_routing_and_stack(name: str, tmp_path: Path) -> None:
    """What is compared before it is kept are texts in other shapes than the example's."""
    model = MODELS[name]()
    written = TorchExport().write(model, "fp32", tmp_path / "model.pt2")
    assert written.nearness.largest < 1e-5
    assert (SENTENCE_VECTOR in written.spec.outputs) == (name == "sentences")
    assert written.bytes.int8 == 0
    num_weights = sum(one.numel() for one in model.parameters())
    assert 4 * num_weights <= written.bytes.fp32 < 4 * num_weights + 1000


def test_several_tasks_in_one_program(tmp_path: Path) -> None:
    """Each call names its task, for the routers and for the head."""
    model = student(
        kind="ForSequenceClassification", router="task_gate", num_tasks=2, config={"num_labels": 5}
    )
    set_heads(model, [TaskHead("a", ("no", "yes")), TaskHead("b", ("x", "y", "z"))])
    written = TorchExport().write(model, "fp32", tmp_path / "model.pt2")
    program = open_program(model, tmp_path / "model.pt2", written.spec)
    for task in (0, 1):
        with use_task(task):
            torch.testing.assert_close(
                logits_of(program, token_batch(3)), logits_of(model, token_batch(3))
            )


def test_a_file_holds_no_pickle_and_no_directory_of_this_machine(
    hashed: Any, tmp_path: Path
) -> None:
    TorchExport().write(hashed, "fp32", tmp_path / "model.pt2")
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("model.json") for name in contents)
    for name, content in contents.items():
        assert not name.endswith((".pt", ".pkl")) or not content
        for place in (Path(torch.__file__).parent.parent, Path(__file__).parents[3]):
            assert str(place).encode() not in content


def test_a_program_is_loaded_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a classifier with two stacks, torch drops a size that it still had bounds for."""
    TorchExport().write(MODELS["two stacks"](), "fp32", tmp_path / "model.pt2")
    torch.export.load(tmp_path / "model.pt2").module()
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_what_has_no_program_says_so() -> None:
    writes = tiny_model("t5", "ForConditionalGeneration")
    with pytest.raises(ConversionError, match=r"and the torch\.export form has no cache"):
        trace(writes, TorchExport.title)
    merged = student(
        router="merged_sequence",
        num_shared=0,
        expert_size=32,
        tie_shared=False,
        method="full_copy",
    )
    with pytest.raises(ConversionError) as caught:
        trace(merged, TorchExport.title)
    assert "moe-dist export DIR --average" in caught.value.remedy
    unpadded = tiny_model("gpt2", "ForSequenceClassification", pad_token_id=None)
    with pytest.raises(ConversionError) as caught:
        trace(unpadded, TorchExport.title)
    assert "pad_token_id" in caught.value.remedy
