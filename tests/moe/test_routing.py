"""Contexts reach the layers of one forward call only, and records hold each layer once."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from moe_dist.errors import MissingInputError
from moe_dist.moe import (
    Routing,
    RoutingContext,
    current_context,
    install_routing_hooks,
    record_routing,
    use_context,
)
from moe_dist.moe.routing import append_routing

IDS = torch.arange(6).view(2, 3)


class Probe(nn.Module):
    """A stack that keeps what its inner modules could see."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.seen: RoutingContext | None = None
        self.inner: nn.Module | None = None
        install_routing_hooks(self, causal=causal)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **extra: object,
    ) -> None:
        if extra.get("fail"):
            raise RuntimeError("broken layer")
        if extra.get("interrupt"):
            raise KeyboardInterrupt
        if self.inner is not None and input_ids is not None:
            self.inner(input_ids + 1)
        self.seen = current_context()


def seen(probe: Probe) -> RoutingContext:
    assert probe.seen is not None
    return probe.seen


def routing(num_tokens: int, expert: int = 0) -> Routing:
    return Routing(torch.full((num_tokens, 1), expert), torch.ones(num_tokens, 1))


@pytest.mark.parametrize("positional", [False, True])
def test_hooks_read_arguments_by_name_or_position(positional: bool) -> None:
    probe = Probe()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    if positional:
        probe(IDS, mask, task_ids=torch.tensor([4, 5]))
    else:
        probe(attention_mask=mask, input_ids=IDS, task_ids=torch.tensor([4, 5]))
    context = seen(probe)
    assert context.token_ids is IDS
    assert context.mask is not None
    assert context.mask.dtype is torch.bool
    assert context.mask.tolist() == mask.bool().tolist()
    assert context.task_ids is not None
    assert context.task_ids.tolist() == [4, 5]
    assert current_context() is None


def test_a_mask_of_queries_by_keys_is_read_by_the_kind_of_stack() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    causal, encoder = Probe(causal=True), Probe()
    causal(IDS, (torch.ones(3, 3).tril().bool() & mask.unsqueeze(1)).unsqueeze(1))
    encoder(IDS, mask[:, None, None, :])
    for probe in (causal, encoder):
        found = seen(probe).mask
        assert found is not None
        assert found.tolist() == mask.tolist()
    encoder(IDS, torch.eye(3).bool()[None, None])
    assert seen(encoder).mask is None
    assert "no padding mask" in seen(encoder).mask_fault
    encoder(IDS)
    assert seen(encoder).mask is None
    assert not seen(encoder).mask_fault


@pytest.mark.parametrize("embeds", [False, True])
def test_the_mask_of_a_cached_past_is_cut_to_the_input(embeds: bool) -> None:
    probe = Probe()
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    if embeds:
        probe(inputs_embeds=torch.zeros(2, 1, 8), attention_mask=mask)
        assert seen(probe).token_ids is None
    else:
        probe(IDS[:, :1], mask)
    cut = seen(probe).mask
    assert cut is not None
    assert cut.tolist() == [[False], [True]]


def test_a_failing_forward_leaves_no_context() -> None:
    probe = Probe()
    with pytest.raises(RuntimeError, match="broken layer"):
        probe(IDS, fail=True)
    assert current_context() is None
    outer = RoutingContext(IDS)
    with use_context(outer):
        with pytest.raises(RuntimeError, match="broken layer"):
            probe(IDS, fail=True)
        assert current_context() is outer


def test_a_hook_that_fails_before_ours_does_not_close_the_callers_context() -> None:
    probe = Probe()

    def refuse(*_: object) -> None:
        raise RuntimeError("refused")

    probe.register_forward_pre_hook(refuse, prepend=True)
    outer = RoutingContext(IDS)
    with use_context(outer):
        with pytest.raises(RuntimeError, match="refused"):
            probe(IDS)
        assert current_context() is outer


def test_an_interrupted_call_leaves_nothing_for_the_next_one() -> None:
    probe = Probe()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            probe(IDS, task_ids=torch.tensor([3, 3]), interrupt=True)
    probe(IDS)
    assert seen(probe).task_ids is None
    assert current_context() is None


def test_nested_stacks_each_see_their_own_tokens() -> None:
    outer, inner = Probe(), Probe()
    outer.inner = inner
    outer(IDS)
    assert torch.equal(_ids(inner), IDS + 1)
    assert seen(outer).token_ids is IDS
    assert current_context() is None


def test_the_callers_task_reaches_a_stack_that_is_given_none() -> None:
    probe = Probe()
    with use_context(RoutingContext(task_ids=torch.tensor([7, 7]))):
        probe(IDS)
        assert seen(probe).token_ids is IDS
        inherited = seen(probe).task_ids
        probe(IDS, task_ids=torch.tensor([1, 2]))
    assert inherited is not None
    assert inherited.tolist() == [7, 7]
    own = seen(probe).task_ids
    assert own is not None
    assert own.tolist() == [1, 2]


def test_hooks_are_installed_once_and_survive_copies() -> None:
    probe = Probe()
    install_routing_hooks(probe)
    assert len(probe._forward_pre_hooks) == len(probe._forward_hooks) == 1
    for twin in (copy.deepcopy(probe), pickle.loads(pickle.dumps(probe))):
        twin(IDS)
        assert torch.equal(_ids(twin), IDS)
        assert current_context() is None
    assert probe.seen is None


def test_use_context_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), use_context(RoutingContext(IDS)):
        raise RuntimeError("stop")
    assert current_context() is None


def test_nothing_is_collected_without_a_record() -> None:
    append_routing("lost", 2, routing(3))
    with record_routing() as record:
        append_routing("first", 2, routing(3))
        with record_routing() as inner:
            append_routing("second", 2, routing(3))
        append_routing("third", 2, routing(3))
    append_routing("lost", 2, routing(3))
    assert [entry.name for entry in record.entries] == ["first", "third"]
    assert [entry.name for entry in inner.entries] == ["second"]


def test_a_record_ends_with_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), record_routing() as record:
        raise RuntimeError("stop")
    append_routing("late", 2, routing(3))
    assert record.entries == []


def test_padding_is_in_the_record() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    with use_context(RoutingContext(IDS, mask)), record_routing() as record:
        append_routing("layer", 3, routing(6, expert=1))
    (entry,) = record.entries
    assert entry.mask_T is not None
    assert entry.mask_T.tolist() == mask.view(-1).tolist()


def test_a_mask_that_does_not_cover_the_layers_tokens_is_an_error_with_a_remedy() -> None:
    context = RoutingContext(IDS, torch.ones(2, 3, dtype=torch.bool))
    with use_context(context):
        append_routing("layer", 2, routing(4))
        with (
            record_routing(),
            pytest.raises(MissingInputError, match=r"(?s)4 tokens.*has 6.*chunk_size_feed_forward"),
        ):
            append_routing("layer", 2, routing(4))


def _ids(probe: Probe) -> Tensor:
    token_ids = seen(probe).token_ids
    assert token_ids is not None
    return token_ids
