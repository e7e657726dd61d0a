"""How experts are spread over the workers that a job finds: by how many, and which are whose."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from math import gcd
from pathlib import Path

import torch
from torch import nn

from moe_dist.conversion.heads import answered_kind
from moe_dist.data.loaders import StepBatch
from moe_dist.distributed.checkpoint_files import STATE_FILE, list_checkpoints
from moe_dist.distributed.expert_placement import Order, even_order, largest_share, plain_order
from moe_dist.distributed.manifest import read_json
from moe_dist.distributed.parameter_groups import moe_layers
from moe_dist.distributed.topology import Topology, fitting_ep_size
from moe_dist.distributed.update import Precision, precision_context
from moe_dist.errors import CheckpointError
from moe_dist.moe.routing import record_routing, use_samples, use_task
from moe_dist.training.balance import sum_choices
from moe_dist.training.collectives import gather_values, num_ranks, own_rank
from moe_dist.training.loop import EXPERT_LOADS, step_seed
from moe_dist.training.step import expert_counts
from moe_dist.training.transfer import to_device

NUM_COUNTED_STEPS = 2
"""Steps whose tokens are counted before the first one is trained on."""
Loads = Mapping[str, Sequence[float]]
"""By a layer's name in records of routing, each expert's tokens."""

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


def settle_expert_orders(
    model: nn.Module,
    ep_size: int,
    steps: Iterable[StepBatch],
    checkpoint_dir: Path | None,
    *,
    seed: int,
    precision: Precision,
    device: torch.device,
) -> dict[str, Order]:
    """Place the experts of each layer so that ranks have alike much to multiply; collective.

    They are placed by the tokens that they lately had where a training goes on, else by those of
    the first steps' texts. Rank 0 logs what comes of it.

    Args:
        model: whole, alike on every rank, on the CPU, where it is afterwards too.
        ep_size: ranks that share one set of experts.
        steps: this rank's part of the data, as it will be trained on.
        checkpoint_dir: of a training that may go on; None if there is none.
        seed: of the training, for what gates and dropout draw.
        precision: to count in.
        device: of the training; what does not fit there whole is counted on the CPU.

    Returns:
        By dotted name the layers whose experts are not held in the order of their numbers.
    """
    layers = {
        name: layer
        for name, layer in moe_layers(model)
        if layer.num_experts > 1 and not layer.merges
    }
    if ep_size == 1 or not layers:
        return {}
    saved = _saved_loads(checkpoint_dir) if own_rank() == 0 and checkpoint_dir is not None else {}
    loads: Loads = gather_values(saved)[0] or _counted_loads(
        model, steps, seed=seed, precision=precision, device=device
    )
    orders, before, after = {}, [], []
    for name, layer in layers.items():
        own = loads.get(layer.name, ())
        if len(own) != layer.num_experts:
            continue
        order, plain = even_order(own, ep_size), plain_order(layer.num_experts)
        before.append(largest_share(own, plain, ep_size))
        after.append(largest_share(own, order, ep_size))
        if order != plain:
            orders[name] = order
    if own_rank() == 0 and before:
        _tell(before, after, len(orders), ep_size)
    return orders


def _saved_loads(checkpoint_dir: Path) -> Loads:
    """Read what the newest checkpoint says; whether it is good is found out when it is loaded."""
    try:
        newest = list_checkpoints(checkpoint_dir)[0]
        loads: Loads = read_json(newest / STATE_FILE)["state"].get(EXPERT_LOADS, {})
    except (IndexError, KeyError, OSError, ValueError, CheckpointError):
        return {}
    return loads


@torch.no_grad()
def _counted_loads(
    model: nn.Module,
    steps: Iterable[StepBatch],
    *,
    seed: int,
    precision: Precision,
    device: torch.device,
) -> Loads:
    """Route as the first steps will, with what gates draw there, and put the model back."""
    was_training = model.training
    counted_on = device if _fits(model, device) else torch.device("cpu")
    model.to(counted_on).train()
    counts = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for number, step in enumerate(islice(steps, NUM_COUNTED_STEPS)):
            torch.manual_seed(step_seed(seed, number, own_rank()))
            sizes = [len(batch["labels"]) for batch in step.micro_batches]
            sample_ids = torch.tensor(step.sample_ids).split(sizes)
            for batch, ids in zip(step.micro_batches, sample_ids, strict=True):
                with (
                    use_samples(ids, step_seed(seed, number, 0)),
                    use_task(step.task),
                    precision_context(precision, counted_on),
                    record_routing() as record,
                ):
                    answered_kind(model).run(model, to_device(batch, counted_on))
                # Ranks add them up where they communicate.
                counts.append(to_device(expert_counts(record), device))
    model.to("cpu").train(was_training)
    return {name: count_E.tolist() for name, count_E in sum_choices(counts).items()}


def _fits(model: nn.Module, device: torch.device) -> bool:
    """Tell whether a whole model and as much again for what it computes have room there."""
    if device.type != "cuda":
        return True
    num_bytes = sum(one.nbytes for one in chain(model.parameters(), model.buffers()))
    return 2 * num_bytes <= torch.cuda.mem_get_info(device)[0]


def _tell(before: list[float], after: list[float], num_moved: int, ep_size: int) -> None:
    """Say what the busiest rank of the layers multiplies, of one layer and on average."""
    even = f"an even share is {1 / ep_size:.0%}"
    if not num_moved:
        logger.warning(
            "experts stay in order: the busiest of %d ranks has at most %.0f%% of a layer's tokens "
            "(%s)",
            *(ep_size, 100 * max(before), even),
        )
        return
    logger.warning(
        "experts of %d layers are placed by load: the busiest of %d ranks has at most %.0f%% of a "
        "layer's tokens and %.0f%% on average, where it had %.0f%% and %.0f%% (%s)",
        *(num_moved, ep_size, 100 * max(after), 100 * sum(after) / len(after)),
        *(100 * max(before), 100 * sum(before) / len(before), even),
    )
