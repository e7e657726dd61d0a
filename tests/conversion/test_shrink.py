"""Smaller students: exact where everything is kept, of the right size, and from the right parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.conversion.families import FAMILIES, find_slots
from moe_dist.conversion.shrink import (
    map_layers,
    plan_shrink,
    shrink_model,
    shrink_scores,
)
from moe_dist.conversion.shrink_layouts import LAYOUTS
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.inference import load_model, save_model
from moe_dist.measure.profile import count_parameters, flops_per_token
from tests.conversion.dense_models import (
    VOCAB_SIZE,
    kinds_of,
    logits_of,
    random_scores,
    tiny_model,
    token_batch,
)

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_size": 12, "intermediate_size": 20}


def teacher(**changes: Any) -> Any:
    return tiny_model("bert", num_hidden_layers=4, num_labels=3, **changes)


every_layout = pytest.mark.parametrize("family", LAYOUTS)


@pytest.mark.parametrize("init", ["importance", "truncate"])
@every_layout
def test_a_student_that_keeps_everything_is_its_teacher(family: str, init: Any) -> None:
    model = tiny_model(family)
    plan = plan_shrink(model, init=init, scores=random_scores(model))
    batch = token_batch()
    student = shrink_model(model, plan)
    torch.testing.assert_close(logits_of(student, batch), logits_of(model, batch))
    assert type(student) is type(model) and student is not model


@every_layout
def test_every_head_that_can_be_cut_is_cut(family: str, tmp_path: Path) -> None:
    for kind in kinds_of(family):
        model = tiny_model(family, kind)
        scores = random_scores(model)
        sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 12, "intermediate_size": 20}
        if kind == "ForMaskedLM":
            with pytest.raises(ConversionError, match="cannot be cut to another width"):
                plan_shrink(model, **sizes, scores=scores)
            continue
        plan = plan_shrink(model, **sizes, scores=scores)
        small = load_model(save_model(shrink_model(model, plan), tmp_path / kind))
        batch = {"input_ids": torch.randint(3, VOCAB_SIZE, (1, 5))}
        if kind == "ForMultipleChoice":
            batch = {"input_ids": batch["input_ids"][None]}
        with torch.no_grad():
            states = small(**batch, output_hidden_states=True).hidden_states
        assert len(states) == 2 and states[-1].shape[-1] == 12
        assert [len(score) for score in shrink_scores(scores, plan)] == [20]


@every_layout
def test_what_adds_nothing_is_left_out_without_a_change(family: str) -> None:
    """Neurons and heads whose outputs nobody reads, and a layer that adds nothing before norms."""
    model = tiny_model(family)
    layout = LAYOUTS[family]
    num_heads, gone = model.config.num_attention_heads // 2, []
    if not layout.drops_heads:
        num_heads = model.config.num_attention_heads
    with torch.no_grad():
        for slot in find_slots(model):
            slot.weights().w_out[:, 20:] = 0
            out = slot.block.get_submodule(layout.attention.out).weight
            kept = num_heads * (out.shape[1] // model.config.num_attention_heads)
            out[:, kept:] = 0  # type: ignore[index]
            gone.append(kept)
    scores = [slot.weights().w_out.abs().sum(dim=0) for slot in find_slots(model)]
    if layout.narrows_heads:
        # Of an encoder's heads none can go while the width stays: heads would have to grow.
        plan = plan_shrink(model, intermediate_size=20, scores=scores)
    else:
        plan = plan_shrink(model, num_heads=num_heads, intermediate_size=20, scores=scores)
        assert [len(ids) for ids in plan.query_ids] == gone
    batch = token_batch()
    small = shrink_model(model, plan)
    torch.testing.assert_close(logits_of(small, batch), logits_of(model, batch))


def test_llama_keeps_the_dimensions_that_are_written_and_read() -> None:
    model = tiny_model("llama", hidden_size=32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 0.01
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight[3] *= 0.01
        model.model.layers[0].input_layernorm.weight[3] = 5  # as where little comes in
    plan = plan_shrink(model, hidden_size=24)
    assert 3 not in plan.hidden_ids
    head_size = model.config.head_dim
    student = shrink_model(model, plan)
    assert student.config.head_dim == head_size == 8, "rotated pairs stay together"
    assert student.config.hidden_size == 24


def test_tied_embeddings_are_cut_together() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    small = shrink_model(model, plan_shrink(model, num_layers=1, hidden_size=12))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.lm_head.weight.shape == (VOCAB_SIZE, 12)


def test_a_body_without_its_pooler_stays_without() -> None:
    from transformers import RobertaModel

    model = RobertaModel(tiny_model("roberta").config, add_pooling_layer=False).eval()
    small = shrink_model(model, plan_shrink(model, num_layers=1))
    assert small.pooler is None


def test_attention_that_keeps_its_scores_keeps_their_scale() -> None:
    """Query dimensions whose keys are zero add nothing, so leaving them out changes nothing."""
    model = teacher()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            attention = layer.attention
            for one in (attention.self.query, attention.self.key, attention.self.value):
                one.weight.view(2, 8, 16)[:, 6:] = 0
                one.bias.view(2, 8)[:, 6:] = 0
            attention.output.dense.weight.view(16, 2, 8)[:, :, 6:] = 0
    plan = plan_shrink(model, hidden_size=12)
    for ids in (*plan.query_ids, *plan.value_ids):
        assert ids == (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13)
    student = shrink_model(model, plan)
    embeddings = torch.randn(1, 5, 16)
    outside = [n for n in range(16) if n not in plan.hidden_ids]
    with torch.no_grad():
        own, whole = student.bert.encoder.layer[0], model.bert.encoder.layer[0]
        for linear in (whole.attention.self.query, whole.attention.self.key):
            linear.weight[:, outside] = 0
        whole.attention.self.value.weight[:, outside] = 0
        wanted = whole.attention.self(embeddings)[0]
        found = own.attention.self(embeddings[:, :, list(plan.hidden_ids)])[0]
    torch.testing.assert_close(found, wanted[:, :, list(plan.value_ids[0])])


def test_weights_are_those_of_the_mapped_layers_and_kept_dimensions() -> None:
    model = teacher()
    scores = random_scores(model)
    plan = plan_shrink(model, **SMALL, scores=scores)
    assert plan.layers == (1, 3)
    student = shrink_model(model, plan)
    hidden = torch.tensor(plan.hidden_ids)
    for own, layer in zip(student.bert.encoder.layer, (1, 3), strict=True):
        best = scores[layer].topk(20).indices.sort().values
        whole = model.bert.encoder.layer[layer]
        assert torch.equal(
            own.intermediate.dense.weight, whole.intermediate.dense.weight[best][:, hidden]
        )
        assert torch.equal(own.intermediate.dense.bias, whole.intermediate.dense.bias[best])
        assert torch.equal(own.output.dense.weight, whole.output.dense.weight[hidden][:, best])
    assert torch.equal(student.classifier.weight, model.classifier.weight[:, hidden])
    words = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(student.bert.embeddings.word_embeddings.weight, words[:, hidden])
    kept = shrink_scores(scores, plan)
    assert [tuple(score.shape) for score in kept] == [(20,), (20,)]
    assert torch.equal(
        kept[1],
        scores[3].sort(descending=True).values[:20][kept[1].argsort(descending=True).argsort()],
    )


def test_truncation_keeps_the_first_and_random_keeps_no_weight() -> None:
    model = teacher()
    first = plan_shrink(model, **SMALL, init="truncate")
    assert first.hidden_ids == tuple(range(12))
    assert first.neuron_ids == (tuple(range(20)),) * 2
    drawn = shrink_model(model, plan_shrink(model, **SMALL, init="random"), seed=1)
    again = shrink_model(model, plan_shrink(model, **SMALL, init="random"), seed=1)
    weight = drawn.bert.encoder.layer[0].intermediate.dense.weight
    assert torch.equal(weight, again.bert.encoder.layer[0].intermediate.dense.weight)
    assert not torch.equal(weight, model.bert.encoder.layer[1].intermediate.dense.weight[:20, :12])


def test_importance_keeps_dimensions_that_normalisations_make_large() -> None:
    """And not those of large weights: what reads a dimension is large where that is small."""
    model = teacher()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter[3] *= 0.01
            elif parameter.dim() == 2 and parameter.shape[-1] == 16:
                parameter[:, 3] *= 100
    kept = plan_shrink(model, hidden_size=14, intermediate_size=20, scores=random_scores(model))
    assert 3 not in kept.hidden_ids
    # Layers that are left out have no say.
    with torch.no_grad():
        for layer in (0, 1):
            model.bert.encoder.layer[layer].output.LayerNorm.weight[3] = 100.0
    last = plan_shrink(
        model,
        num_layers=2,
        layer_map="last",
        hidden_size=14,
        intermediate_size=20,
        scores=random_scores(model),
    )
    assert 3 not in last.hidden_ids


@pytest.mark.parametrize(
    ("layers", "kind", "expected"),
    [
        (4, "uniform", (2, 5, 8, 11)),
        (6, "uniform", (1, 3, 5, 7, 9, 11)),
        (12, "uniform", tuple(range(12))),
        (5, "uniform", (1, 4, 6, 9, 11)),
        (1, "uniform", (11,)),
        (4, "last", (8, 9, 10, 11)),
        (3, [0, 5, 11], (0, 5, 11)),
    ],
)
def test_layer_maps(layers: int, kind: Any, expected: tuple[int, ...]) -> None:
    assert map_layers(layers, 12, kind) == expected


@pytest.mark.parametrize(
    ("layers", "kind", "words"),
    [
        (13, "uniform", "does not fit a teacher of 12"),
        (0, "uniform", "does not fit"),
        (3, [0, 5], "no map for 3"),
        (2, [5, 5], "no map for 2"),
        (2, [5, 12], "does not have"),
        (2, [-1, 5], "does not have"),
    ],
)
def test_maps_that_do_not_fit_are_named(layers: int, kind: Any, words: str) -> None:
    with pytest.raises(ConversionError, match=words):
        map_layers(layers, 12, kind)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 17}, "student.hidden_size=17"),
        ({"intermediate_size": 33}, "student.intermediate_size=33"),
        ({"num_heads": 3}, "student.num_heads=3"),
        ({"hidden_size": 15}, "not divisible by 2"),
        ({"hidden_size": 12, "num_heads": 1}, "at least 2 heads"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConversionError) as caught:
        plan_shrink(teacher(), init="truncate", **changes)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("mpnet", {"num_heads": 1}, "all 2 heads stay"),
        ("llama", {"num_heads": 1}, "use a multiple of 2"),
        ("electra", {"hidden_size": 8}, "has no projection"),
    ],
)
def test_what_a_layout_forbids_is_named(family: str, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConversionError) as caught:
        plan_shrink(tiny_model(family), init="truncate", **changes)
    assert words in str(caught.value)


def test_missing_scores_and_other_families_are_refused() -> None:
    with pytest.raises(MissingInputError, match="scores"):
        plan_shrink(teacher(), **SMALL)
    for family in sorted(set(FAMILIES) - set(LAYOUTS)):
        with pytest.raises(ConversionError, match=r"cannot be made: (its|encoder)"):
            plan_shrink(tiny_model(family), num_layers=1)


def test_a_small_student_can_be_split_into_experts() -> None:
    model = teacher()
    scores = random_scores(model)
    plan = plan_shrink(model, **SMALL, scores=scores)
    small = shrink_model(model, plan)
    split = plan_partition(
        shrink_scores(scores, plan), num_experts=2, expert_size=20, num_shared_neurons=20
    )
    student = dense_to_moe(small, split)
    batch = token_batch()
    torch.testing.assert_close(logits_of(student, batch), logits_of(small, batch))


def test_the_published_student_has_its_published_size_and_cost() -> None:
    """4 layers of width 312: 14.5M parameters, about 1.2 GFLOPs for 128 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_labels=2, attn_implementation="eager")
    with torch.device("meta"):
        model = BertForSequenceClassification(config).eval()
    plan = plan_shrink(
        model, num_layers=4, hidden_size=312, intermediate_size=1200, init="truncate"
    )
    student = shrink_model(model, plan)
    assert next(student.parameters()).is_meta
    assert count_parameters(student).total == pytest.approx(14.5e6, rel=0.015)
    counted = 128 * flops_per_token(student, 128).total
    assert 1.1e9 < counted < 1.3e9
    ids = torch.zeros(1, 128, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as measured:
        student(input_ids=ids)
    assert counted == pytest.approx(measured.get_total_flops(), rel=0.02)
