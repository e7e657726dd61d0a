"""A split as a value: which neurons of each FFN go to which expert.

Shapes: F FFN, E experts, s shared neurons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.errors import ConversionError


@dataclass(frozen=True, eq=False)
class LayerPartition:
    """One FFN's split.

    Args:
        layer: the FFN's index in the model.
        num_neurons: F.
        shared_ids: (s,) int64, neurons that every expert holds.
        expert_ids: (E, expert_size) int64, each expert's neurons, the shared ones first.
    """

    layer: int
    num_neurons: int
    shared_ids: Tensor
    expert_ids: Tensor

    @property
    def kept_ids(self) -> Tensor:
        """Distinct neurons that survive, ascending."""
        return torch.unique(self.expert_ids)


@dataclass(frozen=True, eq=False)
class PartitionPlan:
    """How a whole model is split.

    Args:
        num_experts: E; 1 is the plain pruned dense student.
        expert_size: neurons that one expert computes for a token, shared ones included.
        num_shared_neurons: s.
        method: the name in `PARTITIONS`.
        tie_shared: the shared neurons stay one set of weights, computed once for each token.
        seed: what random methods drew from.
        num_layers: FFNs of the model, converted or not.
        partitions: one for each converted FFN, by ascending index.
    """

    num_experts: int
    expert_size: int
    num_shared_neurons: int
    method: str
    tie_shared: bool
    seed: int
    num_layers: int
    partitions: tuple[LayerPartition, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the FFNs that become mixtures."""
        return tuple(part.layer for part in self.partitions)

    def to_dict(self) -> dict[str, Any]:
        """Give the plan as values that JSON can hold."""
        return {
            "num_experts": self.num_experts,
            "expert_size": self.expert_size,
            "num_shared_neurons": self.num_shared_neurons,
            "method": self.method,
            "tie_shared": self.tie_shared,
            "seed": self.seed,
            "num_layers": self.num_layers,
            "partitions": [
                {
                    "layer": part.layer,
                    "num_neurons": part.num_neurons,
                    "shared_ids": part.shared_ids.tolist(),
                    "expert_ids": part.expert_ids.tolist(),
                }
                for part in self.partitions
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PartitionPlan:
        """Build a plan from `to_dict`'s values; a missing one is a ConversionError."""
        try:
            parts = tuple(
                LayerPartition(
                    layer=int(part["layer"]),
                    num_neurons=int(part["num_neurons"]),
                    shared_ids=torch.tensor(part["shared_ids"], dtype=torch.int64),
                    expert_ids=torch.tensor(part["expert_ids"], dtype=torch.int64),
                )
                for part in values["partitions"]
            )
            return cls(
                num_experts=int(values["num_experts"]),
                expert_size=int(values["expert_size"]),
                num_shared_neurons=int(values["num_shared_neurons"]),
                method=str(values["method"]),
                tie_shared=bool(values["tie_shared"]),
                seed=int(values["seed"]),
                num_layers=int(values["num_layers"]),
                partitions=parts,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConversionError(
                f"not a partition plan: {error!r}",
                remedy="make the plan again with plan_partition",
            ) from error

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> PartitionPlan:
        """Read a plan that `save` wrote; a file without one is a ConversionError."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(
                f"{path} holds no partition plan: {error}",
                remedy="make the plan again with plan_partition",
            ) from error
        return cls.from_dict(values)
