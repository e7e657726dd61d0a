"""Attention scores and their distance against loops, with padding, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch

from moe_dist.errors import ConversionError
from moe_dist.losses.attention import attention_mse, attention_scores

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_scores_equal_the_loop_over_heads() -> None:
    query, key = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    scores = attention_scores(query, key, 2)
    assert scores.shape == (2, 2, 3, 3)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        expected = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(4)
        torch.testing.assert_close(scores[:, head], expected)


READABLE = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")


@pytest.mark.parametrize("family", READABLE)
def test_scores_are_those_of_the_model(family: str) -> None:
    """Softmax of the masked scores gives the probabilities that transformers hands out."""
    from moe_dist.conversion.attention import num_attention_heads, record_attention
    from tests.conversion.dense_models import tiny_model, token_batch

    model = tiny_model(family, attn_implementation="eager")
    batch = token_batch()
    with torch.no_grad(), record_attention(model) as recorded:
        told = model(**batch, output_attentions=True).attentions
    assert len(recorded) == len(told) == 2 and num_attention_heads(model) == 2
    absent = batch["attention_mask"][:, None, None] == 0
    for inputs, probabilities in zip(recorded, told, strict=True):
        scores = attention_scores(inputs.query_BSD, inputs.key_BSD, inputs.num_heads)
        found = scores.masked_fill(absent, -math.inf).softmax(-1)
        torch.testing.assert_close(found, probabilities)


def test_families_whose_scores_are_more_than_products_say_why() -> None:
    from moe_dist.conversion.attention import num_attention_heads
    from moe_dist.conversion.families import FAMILIES
    from tests.conversion.dense_models import tiny_model

    others = sorted(set(FAMILIES) - set(READABLE))
    assert others
    for family in others:
        with pytest.raises(ConversionError, match=r"cannot be read: (they|queries|those) .*\n"):
            num_attention_heads(tiny_model(family))


def test_scores_are_computed_in_float32_under_autocast() -> None:
    query, key = torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = attention_scores(query, key, 2)
    torch.testing.assert_close(scores, attention_scores(query, key, 2))


def test_distance_equals_the_loop_over_pairs() -> None:
    student = [torch.randn(2, 4, 3, 3) for _ in range(2)]
    teacher = [torch.randn(2, 4, 3, 3) for _ in range(2)]
    expected = 0.0
    for own, other in zip(student, teacher, strict=True):
        for sample in range(2):
            length = int(MASK[sample].sum())
            gap = (own - other)[sample, :, :length, :length]
            expected += float(gap.square().mean())
    assert attention_mse(student, teacher, MASK).item() == pytest.approx(expected, rel=1e-5)


def test_padding_is_not_seen_even_where_it_is_nan() -> None:
    short, target = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    wide = torch.full((2, 1, 5, 5), torch.nan)
    wide[:, :, :3, :3] = short
    wide.requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2)
    other = torch.full((2, 1, 5, 5), torch.nan)
    other[:, :, :3, :3] = target
    loss = attention_mse([wide], [other], mask)
    loss.backward()
    assert loss.item() == pytest.approx(attention_mse([short], [target], None).item(), rel=1e-6)
    assert wide.grad is not None and bool(torch.isfinite(wide.grad).all())
    assert bool((wide.grad[:, :, 3:] == 0).all())


def test_extreme_scores_stay_finite() -> None:
    student = torch.full((1, 1, 2, 2), 1e4, dtype=torch.bfloat16, requires_grad=True)
    loss = attention_mse([student], [torch.full((1, 1, 2, 2), -1e4)], None)
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_unequal_heads_and_depths_are_named() -> None:
    with pytest.raises(ValueError, match="equally many heads"):
        attention_mse([torch.zeros(1, 2, 3, 3)], [torch.zeros(1, 4, 3, 3)], None)
    with pytest.raises(ValueError, match="one or more pairs"):
        attention_mse([], [], None)
