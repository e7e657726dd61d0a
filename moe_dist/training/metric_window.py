"""Sums between two lines of the metric log, kept on the device so that steps need no sync."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_dist.training.collectives import sum_over_ranks


class LogWindow:
    """Accumulates loss terms and expert loads over steps and micro-batches of one rank.

    Args:
        device: where the sums are kept, and where ranks communicate.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.last_loads: dict[str, list[float]] = {}
        """By layer each expert's tokens in the newest window that was logged."""
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.num_steps = 0
        self.num_tokens = 0
        self.seconds = 0.0
        self.grad_norm = 0.0
        self._losses: dict[str, Tensor] = {}
        self._weighted: dict[str, Tensor] = {}
        self._loads: dict[str, Tensor] = {}
        self._routing: dict[str, Tensor] = {}
        self._figures: dict[str, float] = {}
        self._steps_with: dict[str, int] = {}
        self._names: set[str] = set()

    def add_micro_batch(
        self,
        losses: Mapping[str, Tensor],
        tokens_per_expert: Mapping[str, Tensor],
        *,
        weighted: Mapping[str, Tensor] | None = None,
        routing_sums: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add one micro-batch's part: losses already divided by the counts of the whole step.

        `weighted` has them as they enter the total; loads and `routing_sums` are by layer.
        """
        self._names.update(losses)
        _add(self._losses, losses, self._device)
        _add(self._weighted, weighted or {}, self._device)
        _add(self._loads, tokens_per_expert, self._device)
        _add(self._routing, routing_sums or {}, self._device)

    def add_step(
        self,
        *,
        grad_norm: float,
        num_tokens: int,
        seconds: float,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Close a step of so many real tokens of all ranks; `grad_norm` is before clipping.

        Norm and `figures` are equal on every rank.
        """
        for name, value in (figures or {}).items():
            self._figures[name] = self._figures.get(name, 0.0) + value
        for name in self._names:
            self._steps_with[name] = self._steps_with.get(name, 0) + 1
        self._names.clear()
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.seconds += seconds
        self.grad_norm += grad_norm

    def metrics(self) -> dict[str, float]:
        """Reduce over ranks and name the values; collective.

        Means over the window's steps (of a loss, over those that had it); empty if it has none.
        """
        if self.num_steps == 0:
            return {}
        values = {
            f"train/{kind}/{name}": float(total) / self._steps_with.get(name, self.num_steps)
            for kind, sums in (("loss", self._losses), ("weighted_loss", self._weighted))
            for name, total in self._reduced(sums).items()
        }
        values |= {f"train/{name}": total / self.num_steps for name, total in self._figures.items()}
        values["train/grad_norm"] = self.grad_norm / self.num_steps
        if self.seconds > 0:
            values["perf/tokens_per_s"] = self.num_tokens / self.seconds
            values["perf/step_s"] = self.seconds / self.num_steps
        for layer, count_E in self._reduced(self._loads).items():
            values[f"moe/load_imbalance/{layer}"] = load_imbalance(count_E)
            self.last_loads[layer] = count_E.tolist()
        for layer, sums in self._reduced(self._routing).items():
            entropy, num_gated, dropped, num_slots = sums.tolist()
            if num_gated:
                values[f"moe/entropy/{layer}"] = entropy / num_gated
            if num_slots:
                values[f"moe/dropped/{layer}"] = dropped / num_slots
        return values

    def state(self) -> dict[str, Any]:
        """Give, summed over ranks, what a resumed run needs to log the same values; collective."""
        losses, loads = self._reduced(self._losses), self._reduced(self._loads)
        weighted = self._reduced(self._weighted)
        return {
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "seconds": self.seconds,
            "grad_norm": self.grad_norm,
            "losses": {name: float(value) for name, value in losses.items()},
            "weighted": {name: float(value) for name, value in weighted.items()},
            "figures": dict(self._figures),
            "steps_with": dict(self._steps_with),
            "loads": {name: count_E.tolist() for name, count_E in loads.items()},
            "routing": {name: sums.tolist() for name, sums in self._reduced(self._routing).items()},
        }

    def restore(self, state: Mapping[str, Any], *, keeps_sums: bool) -> None:
        """Continue an interrupted window; `keeps_sums` on one rank only, as sums are over ranks."""
        self.clear()
        self.num_steps = int(state["num_steps"])
        self.num_tokens = int(state["num_tokens"])
        self.seconds = float(state["seconds"])
        self.grad_norm = float(state["grad_norm"])
        share = 1.0 if keeps_sums else 0.0
        # Checkpoints of earlier versions lack some of them.
        self._losses, self._weighted, self._loads, self._routing = (
            self._restored(state.get(key, {}), share)
            for key in ("losses", "weighted", "loads", "routing")
        )
        self._figures = dict(state.get("figures", {}))
        self._steps_with = dict(
            state.get("steps_with", dict.fromkeys(self._losses, self.num_steps))
        )

    def _restored(self, sums: Mapping[str, Any], share: float) -> dict[str, Tensor]:
        return {
            name: torch.tensor(values, dtype=torch.float64, device=self._device) * share
            for name, values in sums.items()
        }

    def _reduced(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum over ranks in one collective, the window itself left as it is."""
        if not sums:
            return {}
        sizes = [total.numel() for total in sums.values()]
        flat = torch.cat([total.reshape(-1) for total in sums.values()])
        parts = sum_over_ranks(flat).cpu().split(sizes)
        return {
            name: part.reshape(total.shape)
            for (name, total), part in zip(sums.items(), parts, strict=True)
        }


def load_imbalance(count_E: Tensor) -> float:
    """Give the largest of (E,) counts over their mean: 1 is even, E is all on one."""
    mean = float(count_E.double().mean())
    return float(count_E.max()) / mean if mean > 0 else 1.0


def _add(sums: dict[str, Tensor], values: Mapping[str, Tensor], device: torch.device) -> None:
    for name, value in values.items():
        part = value.detach().to(device=device, dtype=torch.float64)
        sums[name] = sums[name] + part if name in sums else part
