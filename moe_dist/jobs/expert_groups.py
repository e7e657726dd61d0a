"""The expert parallel size that a job really runs with, on the workers it finds."""

from __future__ import annotations

import logging
import os
from math import gcd

from torch import nn

from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.distributed.topology import Topology, fitting_ep_size
from moe_dist.training.collectives import gather_values, num_ranks, own_rank

logger = logging.getLogger("moe_dist.training")


def settle_ep_size(model: nn.Module, wished: int) -> int:
    """Fit the expert parallel size to the ranks at hand; collective.

    A model without routed experts has none to spread. Rank 0 logs a size that falls, and expert
    groups that cross nodes.

    Args:
        model: a whole model, alike on every rank.
        wished: `parallel.ep_size`.

    Returns:
        A size that divides the ranks and the experts of every layer.
    """
    num_experts = gcd(*(layer.num_experts for _, layer in moe_layers(model)))
    if num_experts == 0 or wished == 1:
        return 1
    ep_size = fitting_ep_size(num_ranks(), num_experts, wished)
    # Ray Train and torchrun number the nodes; one process has no number, and crosses nothing.
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    topology = Topology(tuple(gather_values(node)), ep_size)
    if own_rank() == 0:
        if ep_size != wished:
            logger.warning(
                "%d workers and %d experts: parallel.ep_size=%d falls to %d",
                *(num_ranks(), num_experts, wished, ep_size),
            )
        if topology.crossing_groups:
            logger.warning("%s", topology.describe_crossing())
    return ep_size
