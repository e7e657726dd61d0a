"""Rows that travel between ranks while the experts multiply the rows that stay.

Autograd functions in pairs: one begins to send the rows, one waits until they are received. What is
computed between the two overlaps with the exchange, and so does its gradient in backward, since
autograd runs the later function first: there, the one that waited sends and the other waits.

Shapes: D width, S slots of this rank's tokens, sorted by expert; R rows received from other ranks,
sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.distributed.mailboxes import Mailboxes
from moe_dist.distributed.position import collective


@dataclass
class Traffic:
    """What this process gave away to send; counters, since a training has no end of it.

    Args:
        num_exchanges: exchanges of rows so far, empty ones included.
        sent_bytes: of all of them together.
    """

    num_exchanges: int = 0
    sent_bytes: int = 0


@dataclass(frozen=True)
class Route:
    """Which rows go where, in one message for each other rank's expert (all in one of two ranks).

    Args:
        slots: (rank of the group, rows among the S) in the order of messages; own rows are absent.
        received: (rank of the group, rows among the R) likewise.
        kept: the rows among the S whose experts are here.
        num_slots: S.
        num_received: R.
        group: the expert-parallel process group.
        traffic: where sent bytes are noted.
        mailboxes: of the group, where its ranks share memory.
    """

    slots: list[tuple[int, slice]]
    received: list[tuple[int, slice]]
    kept: slice
    num_slots: int
    num_received: int
    group: dist.ProcessGroup
    traffic: Traffic
    mailboxes: Mailboxes | None = None


def plan_route(
    sent_GL: list[list[int]],
    received_GL: list[list[int]],
    rank: int,
    group: dist.ProcessGroup,
    traffic: Traffic,
    mailboxes: Mailboxes | None = None,
) -> Route:
    """Lay out the rows of both sides.

    Args:
        sent_GL: this rank's slots for each expert of each rank.
        received_GL: slots of each rank for each expert of this rank.
        rank: this rank's number in the group.
        group: the group.
        traffic: where sent bytes are noted.
        mailboxes: of the group, where its ranks share memory.

    Returns:
        The route. Received rows lie by expert, then by rank, so experts read them as they come.
    """
    slots: list[tuple[int, slice]] = []
    kept = slice(0, 0)
    start = 0
    for peer, counts in enumerate(sent_GL):
        if peer == rank:
            kept = slice(start, start + sum(counts))
        for count in counts:
            if count and peer != rank:
                slots.append((peer, slice(start, start + count)))
            start += count
    received: list[tuple[int, slice]] = []
    end = 0
    for expert in range(len(received_GL[rank])):
        for peer, counts in enumerate(received_GL):
            if peer != rank and counts[expert]:
                received.append((peer, slice(end, end + counts[expert])))
                end += counts[expert]
    if len(sent_GL) == 2:
        # Both sides' rows of one peer are adjacent: one message does.
        slots, received = _joined(slots), _joined(received)
    return Route(slots, received, kept, start, end, group, traffic, mailboxes)


def _joined(messages: list[tuple[int, slice]]) -> list[tuple[int, slice]]:
    if not messages:
        return []
    peer = messages[0][0]
    return [(peer, slice(messages[0][1].start, messages[-1][1].stop))]


class RowExchange:
    """One exchange of rows under way, and the same rows' gradients on their way back.

    Args:
        route: which rows go where.
    """

    def __init__(self, route: Route) -> None:
        self.route = route
        self._works: list[dist.Work] = []
        self._expected: list[tuple[int, int, list[Tensor]]] = []
        self._in_flight: tuple[Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, outward: bool) -> Tensor:
        """Start to send rows and to receive others.

        Args:
            rows: (S, D) if outward, else (R, D).
            outward: towards the experts; else back to the tokens' own ranks.

        Returns:
            (R, D) if outward, else (S, D); not there until `wait`, kept rows never.
        """
        route = self.route
        size = route.num_received if outward else route.num_slots
        sends, receives = (
            (route.slots, route.received) if outward else (route.received, route.slots)
        )
        rows = rows.contiguous()
        target = rows.new_empty(size, *rows.shape[1:])
        route.traffic.num_exchanges += 1
        route.traffic.sent_bytes += sum(rows[where].nbytes for _, where in sends)
        if route.mailboxes is None:
            messages = [_message(dist.irecv, target[at], peer, route) for peer, at in receives]
            messages += [_message(dist.isend, rows[at], peer, route) for peer, at in sends]
            self._works = dist.batch_isend_irecv(messages) if messages else []
        else:
            self._hand_over(_by_peer(rows, sends), _by_peer(target, receives), route.mailboxes)
        self._in_flight = rows, target
        return target

    def _hand_over(
        self,
        sends: dict[int, list[Tensor]],
        receives: dict[int, list[Tensor]],
        mailboxes: Mailboxes,
    ) -> None:
        with collective("all-to-all of tokens"):
            works = [mailboxes.send(peer, pieces) for peer, pieces in sends.items()]
        self._works = [work for work in works if work is not None]
        self._expected = [
            (peer, mailboxes.expect(peer), pieces) for peer, pieces in receives.items()
        ]

    def wait(self) -> Tensor:
        """Wait for all messages, and return what `start` returned."""
        assert self._in_flight is not None, "nothing was started"
        with collective("all-to-all of tokens"):
            for peer, number, pieces in self._expected:
                assert self.route.mailboxes is not None
                self.route.mailboxes.take(peer, number, pieces)
            for work in self._works:
                work.wait()
        target = self._in_flight[1]
        self._works, self._expected, self._in_flight = [], [], None
        return target


def _by_peer(rows: Tensor, messages: list[tuple[int, slice]]) -> dict[int, list[Tensor]]:
    pieces: dict[int, list[Tensor]] = {}
    for peer, where in messages:
        pieces.setdefault(peer, []).append(rows[where])
    return pieces


def _message(operation: Any, rows: Tensor, peer: int, route: Route) -> dist.P2POp:
    return dist.P2POp(operation, rows, group=route.group, group_peer=peer)


class SendOutward(torch.autograd.Function):
    """From (S, D) to two parts of the kept rows, and the received rows, which are under way."""

    @staticmethod
    def forward(
        ctx: Any, rows_SD: Tensor, exchange: RowExchange, first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Begin to send rows; `first` kept rows make up the first part."""
        ctx.exchange, ctx.first = exchange, first
        kept = rows_SD[exchange.route.kept]
        received_RD = exchange.start(rows_SD, outward=True)
        return kept[:first], kept[first:], received_RD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_first: Tensor, grad_second: Tensor, grad_RD: Tensor
    ) -> tuple[Tensor, None, None]:
        """Wait for the gradients that `ReceiveOutward` began to send."""
        del grad_RD
        grad_SD = ctx.exchange.wait()
        kept = grad_SD[ctx.exchange.route.kept]
        kept[: ctx.first].copy_(grad_first)
        kept[ctx.first :].copy_(grad_second)
        return grad_SD, None, None


class ReceiveOutward(torch.autograd.Function):
    """Wait for the received rows."""

    @staticmethod
    def forward(ctx: Any, received_RD: Tensor, exchange: RowExchange) -> Tensor:
        """Wait for rows."""
        ctx.exchange = exchange
        exchange.wait()
        return received_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        """Begin to send their gradients."""
        ctx.exchange.start(grad_RD, outward=False)
        return grad_RD, None


class SendHomeward(torch.autograd.Function):
    """From results (R, D) to (S, D), which is under way."""

    @staticmethod
    def forward(ctx: Any, results_RD: Tensor, exchange: RowExchange) -> Tensor:
        """Begin to send results."""
        ctx.exchange = exchange
        return exchange.start(results_RD, outward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None]:
        """Wait for the gradients that `ReceiveHomeward` began to send."""
        del grad_SD
        return ctx.exchange.wait(), None


class ReceiveHomeward(torch.autograd.Function):
    """Wait for the results, and put those of the kept rows among them."""

    @staticmethod
    def forward(
        ctx: Any, results_SD: Tensor, first: Tensor, second: Tensor, exchange: RowExchange
    ) -> Tensor:
        """Wait for results."""
        ctx.exchange, ctx.first = exchange, first.shape[0]
        exchange.wait()
        kept = results_SD[exchange.route.kept]
        kept[: ctx.first].copy_(first)
        kept[ctx.first :].copy_(second)
        ctx.mark_dirty(results_SD)
        return results_SD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Begin to send the gradients of results."""
        grad_SD = grad_SD.contiguous()
        ctx.exchange.start(grad_SD, outward=True)
        kept = grad_SD[ctx.exchange.route.kept]
        return grad_SD, kept[: ctx.first], kept[ctx.first :], None
