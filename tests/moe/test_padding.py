"""Padding is read from attention masks of queries by keys, or it is said that it cannot be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_dist.errors import MissingInputError
from moe_dist.moe import RoutingContext, record_routing, use_context
from moe_dist.moe.gates import sentence_mask
from moe_dist.moe.padding import real_tokens
from moe_dist.moe.routing import append_routing
from tests.moe.test_routing import routing

LENGTHS = (5, 3, 1)
LEFT = torch.arange(5) >= 5 - torch.tensor(LENGTHS).unsqueeze(1)
RIGHT = LEFT.flip(1)
IDS = torch.zeros(3, 5, dtype=torch.int64)
TRIANGLE = torch.ones(5, 5, dtype=torch.bool).tril()


def causal_mask(real: Tensor) -> Tensor:
    return (TRIANGLE & real.unsqueeze(1)).unsqueeze(1)


def padding_mask(real: Tensor) -> Tensor:
    return real[:, None, None, :].expand(-1, -1, 5, -1)


def added(mask: Tensor, dtype: torch.dtype = torch.float32, low: float | None = None) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low or torch.finfo(dtype).min)


sides = pytest.mark.parametrize("real", [LEFT, RIGHT], ids=["left", "right"])


@sides
@pytest.mark.parametrize(("make", "causal"), [(causal_mask, True), (padding_mask, False)])
def test_padding_is_read_from_masks_of_queries_by_keys(
    real: Tensor, make: Callable[[Tensor], Tensor], causal: bool
) -> None:
    mask = make(real)
    unlike = mask.expand(-1, 2, -1, -1)
    for given in (
        mask,
        mask[:, 0],
        mask.int(),
        unlike,
        added(mask),
        added(mask, torch.float16),
        added(mask, low=-1e4),
        {"full_attention": mask, "sliding_attention": None},
    ):
        found, fault = real_tokens(given, IDS, num_past=0, causal=causal)
        assert not fault
        assert found is not None
        assert found.tolist() == real.tolist()


@sides
def test_a_window_hides_no_token_from_itself(real: Tensor) -> None:
    mask = causal_mask(real) & ~torch.ones(5, 5, dtype=torch.bool).tril(-2)
    found, _ = real_tokens(mask, IDS, num_past=0, causal=True)
    assert found is not None
    assert found.tolist() == real.tolist()


def test_rows_of_padding_that_read_everything_are_padding() -> None:
    mask = causal_mask(LEFT)
    opened = mask | ~mask.any(dim=3, keepdim=True)
    found, _ = real_tokens(opened, IDS, num_past=0, causal=True)
    assert found is not None
    assert found.tolist() == LEFT.tolist()


def test_a_row_of_all_queries_is_read_in_encoders() -> None:
    found, _ = real_tokens(RIGHT[:, None, None, :], IDS, num_past=0, causal=False)
    assert found is not None
    assert found.tolist() == RIGHT.tolist()


@pytest.mark.parametrize("num_free", [0, 4])
def test_the_past_and_a_static_caches_free_columns_are_left_out(num_free: int) -> None:
    free = torch.zeros(3, 1, 5, num_free, dtype=torch.bool)
    mask = torch.cat([causal_mask(LEFT), free], dim=3)[:, :, 2:]
    found, _ = real_tokens(mask, IDS[:, 2:], num_past=2, causal=True)
    assert found is not None
    assert found.tolist() == LEFT[:, 2:].tolist()
    whole, _ = real_tokens(
        torch.cat([causal_mask(LEFT), free], dim=3), IDS, num_past=0, causal=True
    )
    assert whole is not None
    assert whole.tolist() == LEFT.tolist()


def test_masks_that_let_all_be_read_have_no_padding() -> None:
    assert real_tokens(None, IDS, num_past=0, causal=True) == (None, "")
    assert real_tokens({"full_attention": None}, IDS, num_past=0, causal=True) == (None, "")
    found, _ = real_tokens(torch.ones(3, 1, 5, 5), IDS, num_past=0, causal=False)
    assert found is not None
    assert bool(found.all())


PACKED = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool()
EVERY_OTHER = TRIANGLE & ~torch.eye(5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "causal", "words"),
    [
        (PACKED & TRIANGLE, True, "shape (1, 1, 5, 5) that is no causal mask"),
        (PACKED, False, "shape (1, 1, 5, 5) that is no padding mask"),
        (torch.ones(5, 5), True, "no causal mask"),
        (TRIANGLE, False, "no padding mask"),
        (EVERY_OTHER, True, "no causal mask"),
        (TRIANGLE[:, 2:], True, "shape (1, 1, 5, 3) that is no causal mask"),
        (torch.ones(1, 5), True, "no causal mask"),
    ],
)
def test_what_does_not_tell_padding_is_named(mask: Tensor, causal: bool, words: str) -> None:
    found, fault = real_tokens(mask[None, None], IDS, num_past=0, causal=causal)
    assert found is None
    assert words in fault


def test_other_kinds_of_masks_are_named() -> None:
    for mask, words in (
        (object(), "of the kind object"),
        ({"chunked_attention": TRIANGLE}, "the masks of chunked_attention"),
        (torch.ones(5), "shape (5,)"),
        (torch.stack([causal_mask(LEFT)[:, 0], causal_mask(RIGHT)[:, 0]], dim=1), "(3, 2, 5, 5)"),
    ):
        assert words in real_tokens(mask, IDS, num_past=0, causal=True)[1]


def test_whoever_needs_it_says_that_padding_is_not_known() -> None:
    context = RoutingContext(IDS, mask_fault="an attention mask of the kind BlockMask")
    with pytest.raises(MissingInputError, match=r"(?s)gate must leave padding out.*BlockMask.*two"):
        sentence_mask(torch.zeros(15, 2), context, router="gate")
    with use_context(context):
        append_routing("layer", 2, routing(15))
        with record_routing(), pytest.raises(MissingInputError, match="'layer' must leave padding"):
            append_routing("layer", 2, routing(15))


def test_an_empty_batch_has_no_padding_to_read() -> None:
    mask = torch.ones(0, 1, 5, 5, dtype=torch.bool)
    assert real_tokens(mask, IDS[:0], num_past=0, causal=True)[0] is None
