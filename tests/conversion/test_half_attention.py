"""Attention in bfloat16 on a CPU learns as attention does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moe_dist.conversion import half_attention as module_of_it
from moe_dist.conversion.half_attention import attend as typed_attend
from moe_dist.conversion.half_attention import half_attention
from moe_dist.moe.routing import checkpoint_context_fn
from tests.conversion.dense_models import tiny_model, token_batch
from tests.inference.moe_students import student
from tests.inference.native_forms import is_native, threads

attend: Any = typed_attend


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often torch's slow backward pass was gone round; there are no products of blocks."""
    monkeypatch.setattr(module_of_it, "has_block_attention", lambda: False)
    calls: list[int] = []
    own = module_of_it._flash_backward

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        assert {args[i].dtype for i in range(5)} == {torch.float32}
        return own(*args, **kwargs)

    monkeypatch.setattr(module_of_it, "_flash_backward", count)
    return calls


needs_blocks = pytest.mark.skipif(not is_native("bf16"), reason="not on this processor")


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often attention was differentiated in products of blocks."""
    calls: list[int] = []
    own = module_of_it._BlockAttention.backward

    def count(ctx: Any, grad: Tensor) -> Any:
        calls.append(1)
        return own(ctx, grad)

    monkeypatch.setattr(module_of_it._BlockAttention, "backward", staticmethod(count))
    return calls


@pytest.fixture
def in_blocks(block_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The same where torch's kernels are barred."""

    def barred(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(module_of_it, "_flash", barred)
    return block_calls


def tensors(num_heads: int = 4, seq_len: int = 9, seed: int = 0, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, seq_len, num_heads, width)  # as layers give it, heads beside each other
    return torch.randn(shape, generator=generator, dtype=torch.float64).transpose(1, 2)


def results(given: list[Tensor], dtype: torch.dtype, how: Any, **options: Any) -> list[Tensor]:
    """The output and the three gradients, float64."""
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in given]
    mask = options.pop("mask", None)
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.to(dtype)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = leaves[0].shape[1] // leaves[1].shape[1]
    out, _ = how(module, *leaves, mask, **({"is_causal": False} | options))
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)).sum().backward()
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves)]


def masks() -> dict[str, Any]:
    padded = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    padded[1, ..., 5:] = False
    return {
        "none": {},
        "causal": {"is_causal": True},
        "scale": {"scaling": 0.3},
        "padding": {"mask": padded.expand(2, 1, 9, 9)},
        "bools": {"mask": torch.ones(9, 9).tril().bool()},
        "numbers": {"mask": torch.linspace(-2, 2, 81).view(1, 1, 9, 9).double()},
        "numbers that bfloat16 rounds": {"mask": torch.full((1, 1, 9, 9), 100.3).double()},
    }


def test_a_mask_that_is_rounded(taken: list[int]) -> None:
    """As float32 under autocast: what is added in the backward pass is what was added before."""
    given = [tensors(seed=seed) for seed in range(3)]
    mask = torch.full((1, 1, 9, 9), 100.3)
    mask[..., 4:] = -1e9
    true = results(given, torch.float64, sdpa_attention_forward, mask=mask.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = results(given, torch.float32, attend, mask=mask)
    assert len(taken) == 1
    for own, right in zip(found, true, strict=True):
        assert float((own - right).norm()) < 0.02 * float(right.norm())


@pytest.mark.parametrize("name", masks())
def test_gradients_are_as_near_as_torchs_own(name: str, taken: list[int]) -> None:
    given = [tensors(seed=seed) for seed in range(3)]
    true = results(given, torch.float64, sdpa_attention_forward, **masks()[name])
    plain = results(given, torch.bfloat16, sdpa_attention_forward, **masks()[name])
    found = results(given, torch.bfloat16, attend, **masks()[name])
    assert len(taken) == 1
    assert torch.equal(found[0], plain[0])
    for own, torchs, right in zip(found, plain, true, strict=True):
        assert float((own - right).abs().max()) < 0.02 * float(right.abs().max())
        assert float((own - right).norm()) <= 1.05 * float((torchs - right).norm())


def assert_near(found: list[Tensor], true: list[Tensor]) -> None:
    for own, right in zip(found, true, strict=True):
        assert own.shape == right.shape
        assert float((own - right).norm()) <= 0.012 * float(right.norm())
        assert float((own - right).abs().max()) <= 0.02 * float(right.abs().max())


@needs_blocks
@pytest.mark.parametrize("name", masks())
def test_blocks_under_every_mask(name: str, in_blocks: list[int]) -> None:
    given = [tensors(seed=seed).bfloat16() for seed in range(3)]
    true = results(
        [one.double() for one in given], torch.float64, sdpa_attention_forward, **masks()[name]
    )
    assert_near(results(given, torch.bfloat16, attend, **masks()[name]), true)
    assert len(in_blocks) == 1


@needs_blocks
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("width", [2, 10, 16, 34, 64])
@pytest.mark.parametrize("seq_len", [2, 3, 16, 31, 32, 33, 64, 65, 130, 256])
def test_blocks_of_any_size(
    seq_len: int, width: int, num_threads: int, causal: bool, in_blocks: list[int]
) -> None:
    given = [tensors(3, seq_len, seed, width).bfloat16() for seed in range(3)]
    true = results(
        [one.double() for one in given], torch.float64, sdpa_attention_forward, is_causal=causal
    )
    with threads(num_threads):
        found = results(given, torch.bfloat16, attend, is_causal=causal)
    assert_near(found, true)
    assert len(in_blocks) == 1


@needs_blocks
def test_a_token_alone_and_one_that_sees_nothing(in_blocks: list[int]) -> None:
    alone = [tensors(seq_len=1, seed=seed).bfloat16() for seed in range(3)]
    out, of_query, of_key, of_value = results(alone, torch.bfloat16, attend)
    assert torch.equal(out, alone[2].transpose(1, 2).double())
    assert not of_query.any() and not of_key.any() and of_value.any()

    given = [tensors(seed=seed).bfloat16() for seed in range(3)]
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    seen[1, :, 4] = False
    found = results(given, torch.bfloat16, attend, mask=seen)
    assert not found[0][1, 4].any() and not found[1][1, :, 4].any()
    assert all(tensor.isfinite().all() for tensor in found)


@needs_blocks
def test_heads_that_share_keys_in_blocks(in_blocks: list[int]) -> None:
    given = [tensors(6).bfloat16(), tensors(2, seed=1).bfloat16(), tensors(2, seed=2).bfloat16()]
    doubles = [one.double() for one in given]
    true = results(doubles, torch.float64, sdpa_attention_forward, is_causal=True)
    assert_near(results(given, torch.bfloat16, attend, is_causal=True), true)
    assert len(in_blocks) == 1


@needs_blocks
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_text(what: float, in_blocks: list[int]) -> None:
    given = [tensors(seed=seed).bfloat16() for seed in range(3)]
    whole = results(given, torch.bfloat16, attend)
    given[0][1, 2, 3, 4] = what
    for own, before in zip(results(given, torch.bfloat16, attend), whole, strict=True):
        assert torch.equal(own[0], before[0])
        assert not own[1].isfinite().all()


@needs_blocks
def test_parts_of_one_product_of_all_three(in_blocks: list[int]) -> None:
    """As where one layer gives queries, keys and values: rows lie further apart."""
    generator = torch.Generator().manual_seed(0)
    joined = torch.randn(2, 9, 3, 4, 16, generator=generator).bfloat16().requires_grad_()
    parts = joined.permute(2, 0, 3, 1, 4)
    out, _ = attend(torch.nn.Module(), *parts, None, is_causal=False)
    out.square().sum().backward()
    apart = [part.detach().clone().requires_grad_() for part in parts]
    attend(torch.nn.Module(), *apart, None, is_causal=False)[0].square().sum().backward()
    assert joined.grad is not None
    for own, other in zip(joined.grad.permute(2, 0, 3, 1, 4), apart, strict=True):
        assert torch.equal(own, other.grad)


@needs_blocks
def test_what_follows_may_write_over_it_and_give_any_gradient(in_blocks: list[int]) -> None:
    parts = [torch.randn(2, 3, 5, 4).bfloat16().requires_grad_() for _ in range(3)]
    out, _ = attend(torch.nn.Module(), *parts, None, is_causal=False)
    torch.nn.functional.relu_(out).sum().backward()
    # Rows of 13 numbers, of which the last is not attention's.
    out, _ = attend(torch.nn.Module(), *parts, None, is_causal=False)
    one = torch.ones(2, 5, 1, dtype=torch.bfloat16)
    torch.cat([out.flatten(2), one], dim=-1).square().sum().backward()
    assert len(in_blocks) == 2


def kept_weights(shape: tuple[int, ...], rate: float, seed: int) -> Tensor:
    """Which weights dropout keeps, (B, H, S, S): with equal ones a value of each key shows them."""
    *batch_and_heads, length = shape
    width = length + length % 2
    alike = torch.zeros(*batch_and_heads, length, width, dtype=torch.bfloat16)
    values = torch.eye(length, width, dtype=torch.bfloat16).expand_as(alike).contiguous()
    torch.manual_seed(seed)
    query = alike.clone().requires_grad_()
    out, _ = attend(torch.nn.Module(), query, alike, values, None, dropout=rate, is_causal=False)
    return (out.detach().transpose(1, 2)[..., :length] > 0).double()


@needs_blocks
@pytest.mark.parametrize("seq_len", [9, 40, 130])
def test_dropout_leaves_out_the_same_weights_backwards(seq_len: int, in_blocks: list[int]) -> None:
    given = [tensors(seq_len=seq_len, seed=seed).bfloat16() for seed in range(3)]
    kept = kept_weights((2, 4, seq_len), 0.3, seed=5)
    torch.manual_seed(5)
    found = results(given, torch.bfloat16, attend, dropout=0.3)

    def plainly(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        return (weights * kept / 0.7 @ value).transpose(1, 2), None

    assert_near(found, results([one.double() for one in given], torch.float64, plainly))
    torch.manual_seed(5)
    again = results(given, torch.bfloat16, attend, dropout=0.3)
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))
    other = results(given, torch.bfloat16, attend, dropout=0.3)
    assert not torch.equal(found[0], other[0])


@needs_blocks
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_leaves_out_as_many_as_it_should_and_each_by_itself(rate: float) -> None:
    kept = kept_weights((16, 12, 64), rate, seed=1)
    spread = (rate * (1 - rate)) ** 0.5
    for dims in ((), (0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)):
        mean = kept.mean(dims) if dims else kept.mean()
        limit = 5 * spread / (kept.numel() / mean.numel()) ** 0.5
        assert float((mean - (1 - rate)).abs().max()) < limit
    others = kept_weights((16, 12, 64), rate, seed=2)
    gap = (kept - kept.mean()) / spread
    for first, second in (
        *(
            (gap.narrow(dim, 1, gap.shape[dim] - 1), gap.narrow(dim, 0, gap.shape[dim] - 1))
            for dim in range(4)
        ),
        (gap, (others - others.mean()) / spread),
    ):
        assert abs(float((first * second).mean())) < 5 / first.numel() ** 0.5


def enable_checkpointing(model: Any) -> None:
    """As training does where a recipe asks for it."""
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": checkpoint_context_fn,
        }
    )


def gradient_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """All gradients of a loss under autocast, one after the other."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)[0].float().square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@needs_blocks
def test_dropout_under_gradient_checkpointing_is_drawn_once() -> None:
    batch, gradients = token_batch(), []
    for checkpointing in (False, True):
        model = student(router="token_gate")
        model.train()
        if checkpointing:
            enable_checkpointing(model)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        torch.manual_seed(3)
        with half_attention():
            gradients.append(gradient_of(model, batch))
    plain, found = gradients
    assert float((found - plain).norm()) < 1e-3 * float(plain.norm())


@needs_blocks
def test_what_blocks_do_not_take_is_torchs() -> None:
    """Longer texts, keys of another text, odd widths."""
    for query, key in (
        (tensors(seq_len=257), tensors(seq_len=257, seed=1)),
        (tensors(seq_len=5), tensors(seed=1)),
        (tensors(width=15), tensors(seed=1, width=15)),
    ):
        given = [query, key, key.flip(0)]
        true = results(given, torch.float64, sdpa_attention_forward)
        for own, right in zip(results(given, torch.bfloat16, attend), true, strict=True):
            assert float((own - right).norm()) < 0.02 * float(right.norm())


def test_heads_that_share_keys(taken: list[int]) -> None:
    given = [tensors(6), tensors(2, seed=1), tensors(2, seed=2)]
    true = results(given, torch.float64, sdpa_attention_forward, is_causal=True)
    found = results(given, torch.bfloat16, attend, is_causal=True)
    assert len(taken) == 1
    for own, right in zip(found, true, strict=True):
        assert own.shape == right.shape
        assert float((own - right).abs().max()) < 0.02 * float(right.abs().max())


def test_what_is_left_to_torch(taken: list[int]) -> None:
    given = [tensors(seed=seed) for seed in range(3)]
    for dtype, options in (
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.bfloat16, {"dropout": 0.5}),
        (torch.bfloat16, {"position_bias": torch.zeros(1, 4, 9, 9).bfloat16()}),
    ):
        results(given, dtype, attend, **options)
    halves = [tensor.bfloat16().requires_grad_() for tensor in given]
    turned = torch.randn(2, 4, 16, 9).bfloat16().transpose(-1, -2).requires_grad_()
    one = [tensor[:1] for tensor in halves]
    for strange in ([turned] * 3, [halves[0], *one[1:]], [one[0], *halves[1:]]):
        expected = sdpa_attention_forward(torch.nn.Module(), *strange, None, is_causal=False)[0]
        found = attend(torch.nn.Module(), *strange, None, is_causal=False)[0]
        assert torch.equal(found, expected)
        found.sum().backward()
    for wrong in (
        [tensors(6).bfloat16().requires_grad_(), *halves[1:]],
        [*halves, torch.ones(2, 1, 9, 9, dtype=torch.int64)],
    ):
        with pytest.raises(RuntimeError):
            attend(torch.nn.Module(), *wrong[:3], wrong[3] if len(wrong) > 3 else None)
    bias = torch.zeros(1, 1, 9, 9, dtype=torch.bfloat16, requires_grad=True)
    attend(torch.nn.Module(), *halves, bias)[0].sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        assert not attend(torch.nn.Module(), *halves, None)[0].requires_grad
    assert not taken


@needs_blocks
@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "gpt2", "bart"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_under_autocast_in_blocks(
    family: str, checkpointing: bool, block_calls: list[int]
) -> None:
    assert_models_learn_alike(family, checkpointing, block_calls)


@pytest.mark.parametrize("family", ["bert", "llama", "modernbert", "gpt2", "bart"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_models_under_autocast(family: str, checkpointing: bool, taken: list[int]) -> None:
    """With gradient checkpointing too, which runs layers again in the backward pass."""
    assert_models_learn_alike(family, checkpointing, taken)


def assert_models_learn_alike(family: str, checkpointing: bool, taken: list[int]) -> None:
    batch = token_batch()
    gradients = []
    for mode in (nullcontext(), half_attention()):
        model = tiny_model(family) if family != "bert" else student(router="token_gate")
        if checkpointing:
            enable_checkpointing(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        with mode:
            gradients.append(gradient_of(model, batch))
    assert taken
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    plain, found = gradients
    assert float((found - plain).norm()) < 0.03 * float(plain.norm())


def test_trainings_within_one_another_and_what_others_put_there() -> None:
    with half_attention(), half_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attend
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward

    def mine(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    ALL_ATTENTION_FUNCTIONS["sdpa"] = mine
    try:
        with half_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is mine
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
