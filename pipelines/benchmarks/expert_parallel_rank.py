"""What each process of the expert-parallel benchmark builds and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from moe_dist.distributed.all_to_all import AllToAllDispatcher
from moe_dist.distributed.deepspeed_runtime import start_deepspeed
from moe_dist.distributed.expert_parallel import ExpertParallelMoE
from moe_dist.moe import Experts, MoELayer, build_router

OURS, DEEPSPEED, FLOOR = "moe-dist", "DeepSpeed", "floor"
# Wide enough that the chosen expert's probability is 1 in fp32, as a straight-through gate weighs.
_GATE_MARGIN = 120.0


@dataclass(frozen=True)
class Sizes:
    """What is multiplied.

    Args:
        num_tokens: tokens of each rank.
        d_model: width of the hidden states.
        expert_size: neurons of one expert.
        num_experts: experts over all ranks.
    """

    num_tokens: int
    d_model: int
    expert_size: int
    num_experts: int


@dataclass
class Pass:
    """One way through the layer: forward, and backward from a fixed gradient.

    Args:
        module: holds the parameters whose gradients are cleared first.
        apply: from rows to outputs.
        rows: the input; it gets a gradient.
        grad: of the output.
    """

    module: nn.Module
    apply: Callable[[Tensor], Tensor]
    rows: Tensor
    grad: Tensor

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Run it and return the output and the input's gradient."""
        self.module.zero_grad(set_to_none=True)
        rows = self.rows.detach().requires_grad_()
        output = self.apply(rows)
        output.backward(self.grad)
        assert rows.grad is not None
        return output.detach(), rows.grad


def measure(sizes: Sizes, load: int, num_repeats: int) -> dict[str, Any]:
    """Build the three ways, time them in turns, and compare ours with DeepSpeed's.

    Args:
        sizes: what is multiplied.
        load: how many times the others' share the first expert draws.
        num_repeats: timed rounds, after one that is not timed.

    Returns:
        ``seconds``: each way's times, of the slowest rank; ``max_difference``: see
        `ExpertParallelResult`; ``sent_bytes`` and ``leaving_bytes``: of this rank's tokens in one
        forward dispatch.
    """
    start_deepspeed()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    expert_ids = draw_experts(sizes, load, rank)
    tokens_TD = make_tokens(sizes, expert_ids, rank)
    grad_TD = torch.randn(tokens_TD.shape, generator=torch.Generator().manual_seed(100 + rank))
    whole = whole_layer(sizes)
    plain = plain_experts(whole.experts)
    ours = ExpertParallelMoE(whole, num_ranks)
    ours.set_deepspeed_parallelism()
    first = rank * ours.num_local_experts
    mine = plain[first : first + ours.num_local_experts]
    native = native_layer(sizes, ours, mine)
    received_L = _received_counts(expert_ids, sizes.num_experts)
    floor = GroupedRows(mine, received_L)
    grouped_RD = torch.randn(sum(received_L), sizes.d_model)
    passes = {
        OURS: Pass(ours, ours, tokens_TD, grad_TD),
        DEEPSPEED: Pass(native, lambda rows: cast(Tensor, native(rows)[0]), tokens_TD, grad_TD),
        FLOOR: Pass(floor, floor, grouped_RD, torch.randn_like(grouped_RD)),
    }
    seconds = time_in_turns(passes, num_repeats)
    dispatcher = cast(AllToAllDispatcher, ours.dispatcher)
    before = dispatcher.traffic.sent_bytes
    difference = _largest_difference(passes[OURS], passes[DEEPSPEED], ours, native)
    leaving = int((expert_ids // ours.num_local_experts != rank).sum())
    return {
        "seconds": seconds,
        "max_difference": difference,
        "sent_bytes": dispatcher.traffic.sent_bytes - before,
        "leaving_bytes": leaving * sizes.d_model * tokens_TD.element_size(),
    }


def draw_experts(sizes: Sizes, load: int, rank: int) -> Tensor:
    """Give each token an expert, (T,): the first one `load` times as many as each other."""
    shares_E = torch.ones(sizes.num_experts)
    shares_E[0] = load
    ends_E = (shares_E.cumsum(0) / shares_E.sum() * sizes.num_tokens).round().long()
    expert_ids = torch.searchsorted(ends_E, torch.arange(sizes.num_tokens), right=True)
    order = torch.randperm(sizes.num_tokens, generator=torch.Generator().manual_seed(rank))
    return expert_ids[order]


def make_tokens(sizes: Sizes, expert_ids: Tensor, rank: int) -> Tensor:
    """Draw tokens (T, D) whose first columns tell the gate which expert, of (T,), they want."""
    generator = torch.Generator().manual_seed(10 + rank)
    tokens_TD = torch.randn(sizes.num_tokens, sizes.d_model, generator=generator)
    tokens_TD[:, : sizes.num_experts] = nn.functional.one_hot(expert_ids, sizes.num_experts).float()
    return tokens_TD


def whole_layer(sizes: Sizes) -> MoELayer:
    """Build our layer with all experts, alike on every rank; its gate reads the first columns."""
    torch.manual_seed(0)
    router = build_router("token_gate", d_model=sizes.d_model, num_experts=sizes.num_experts)
    gate = cast(nn.Linear, router.gate)
    with torch.no_grad():
        gate.weight.copy_(torch.eye(sizes.num_experts, sizes.d_model) * _GATE_MARGIN)
    experts = Experts(sizes.num_experts, sizes.d_model, sizes.expert_size, activation="gelu")
    return MoELayer(experts, router)


def plain_experts(experts: Experts) -> nn.ModuleList:
    """Copy stacked ungated experts with biases to one plain Linear, GELU, Linear each."""
    copies = nn.ModuleList()
    for index in range(experts.num_experts):
        network = nn.Sequential(
            nn.Linear(experts.d_model, experts.expert_size),
            nn.GELU(),
            nn.Linear(experts.expert_size, experts.d_model),
        )
        names = {"0.weight": "w_in", "0.bias": "b_in", "2.weight": "w_out", "2.bias": "b_out"}
        stacked = dict(experts.named_parameters())
        network.load_state_dict({to: stacked[of][index] for to, of in names.items()})
        copies.append(network)
    return copies


def native_layer(sizes: Sizes, ours: ExpertParallelMoE, mine: nn.ModuleList) -> MoE:
    """Build DeepSpeed's own layer with our gate and this rank's experts; it drops no tokens."""
    layer = MoE(sizes.d_model, mine[0], sizes.num_experts, ours.ep_size, k=1, drop_tokens=False)
    layer.set_deepspeed_parallelism()
    inner = layer.deepspeed_moe
    inner.experts.deepspeed_experts.load_state_dict(mine.state_dict())
    assert ours.router is not None
    inner.gate.wg.load_state_dict(cast(nn.Linear, ours.router.gate).state_dict())
    return layer


class GroupedRows(nn.Module):
    """The multiplies alone: each expert on its rows, which already lie together.

    Args:
        experts: plain networks.
        counts: rows of each.
    """

    def __init__(self, experts: nn.ModuleList, counts: list[int]) -> None:
        super().__init__()
        self.experts = experts
        self.counts = counts

    def forward(self, rows_RD: Tensor) -> Tensor:
        """Apply them to (R, D) rows grouped by expert."""
        groups = rows_RD.split(self.counts)
        return torch.cat(
            [expert(group) for expert, group in zip(self.experts, groups, strict=True)]
        )


def time_in_turns(passes: dict[str, Pass], num_repeats: int) -> dict[str, list[float]]:
    """Time each way in seconds, once a round; the slowest rank counts, and two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_number in range(-2, num_repeats):
        for name, one_pass in passes.items():
            dist.barrier()
            start_s = time.perf_counter()
            one_pass()
            taken = torch.tensor(time.perf_counter() - start_s)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if round_number >= 0:
                seconds[name].append(float(taken))
    return seconds


def _received_counts(expert_ids: Tensor, num_experts: int) -> list[int]:
    counts_E = torch.bincount(expert_ids, minlength=num_experts)
    dist.all_reduce(counts_E)
    return cast(list[int], counts_E.chunk(dist.get_world_size())[dist.get_rank()].tolist())


def _largest_difference(one: Pass, other: Pass, ours: ExpertParallelMoE, native: MoE) -> float:
    """Compare outputs, input gradients and this rank's weight gradients; collective."""
    pairs = list(zip(one(), other(), strict=True))
    networks = native.deepspeed_moe.experts.deepspeed_experts
    stacked = {"w_in": "0.weight", "b_in": "0.bias", "w_out": "2.weight", "b_out": "2.bias"}
    for name, parameter in ours.experts.named_parameters():
        theirs = torch.stack([network.get_parameter(stacked[name]).grad for network in networks])
        assert parameter.grad is not None
        pairs.append((parameter.grad, theirs))
    largest = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    found = torch.tensor(largest)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)
