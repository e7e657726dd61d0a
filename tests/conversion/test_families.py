"""What every family must do, whatever its names and layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.inference import load_model, save_model
from moe_dist.moe.layer import moe_layers
from tests.conversion.dense_models import (
    LLAMA_KIN,
    NUM_NEURONS,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)


def converted(model: Any, *, whole: bool = False, router: str = "token_gate") -> Any:
    sizes = (NUM_NEURONS, NUM_NEURONS) if whole else (8, 4)
    plan = plan_partition(
        random_scores(model), num_experts=4, expert_size=sizes[0], num_shared_neurons=sizes[1]
    )
    return dense_to_moe(model, plan, router=router, seed=1)


@pytest.mark.parametrize("kind", ["ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family", LLAMA_KIN)
def test_heads_that_make_their_body_by_its_configuration(
    family: str, kind: str, tmp_path: Path
) -> None:
    """They ask AutoModel for the body, which is then one of ours inside one of ours."""
    model = tiny_model(family, kind)
    student = converted(model, whole=True, router="hash_random")
    batch = token_batch()
    torch.testing.assert_close(logits_of(student, batch), logits_of(model, batch))
    assert [layer.name for layer in moe_layers(student)] == ["model.layers.0", "model.layers.1"]
    with torch.no_grad():
        for layer in moe_layers(student):
            layer.experts.w_out.mul_(torch.rand_like(layer.experts.w_out))
    loaded = load_model(save_model(student, tmp_path / "model"))
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(student, batch))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", LLAMA_KIN)
def test_tied_embeddings_stay_tied(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    student = converted(model)
    loaded = load_model(save_model(student, tmp_path / "model"))
    for one in (student, loaded):
        into, out = one.get_input_embeddings().weight, one.get_output_embeddings().weight
        assert (into is out) == tied
    batch = token_batch()
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(student, batch))
