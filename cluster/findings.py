"""What a check found, and the faults that follow from what nodes and workers told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_dist.distributed.topology import Topology, fitting_ep_size

from .exchange import Exchange
from .node_probe import MISSING

State = Literal["ok", "warning", "fault"]
MAX_SKEW_S = 1.0
"""Timeouts and log times are compared between nodes; a second does not matter to them."""
SLOW_GB_PER_S = 0.1


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: what was looked at.
        state: `fault` where a run would fail, `warning` where it would be slow or at risk.
        found: what was seen.
        remedy: what to do about it; empty where all is well.
    """

    check: str
    state: State
    found: str
    remedy: str = ""


def judge_versions(versions: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Give a fault for each package that differs or is missing on a node."""
    packages = dict.fromkeys(name for found in versions.values() for name in found)
    findings = []
    for package in packages:
        nodes_of: dict[str, list[str]] = {}
        for node, found in versions.items():
            nodes_of.setdefault(found.get(package, MISSING), []).append(node)
        if len(nodes_of) > 1 or MISSING in nodes_of:
            told = "; ".join(f"{version} on {', '.join(at)}" for version, at in nodes_of.items())
            findings.append(
                Finding(
                    "versions",
                    "fault",
                    f"{package}: {told}",
                    "Install the same constraints.txt on every node, and submit the run with its "
                    "working directory or put the checkout on shared storage.",
                )
            )
    if findings:
        return findings
    first = next(iter(versions.values()), {})
    told = ", ".join(f"{name} {version}" for name, version in first.items())
    return [Finding("versions", "ok", f"{len(versions)} node(s): {told}")]


def judge_storage(
    directory: str, unwritable: Mapping[str, str], unseen: Mapping[str, Sequence[str]]
) -> list[Finding]:
    """Tell whether all nodes write to, and see, the same storage.

    `unwritable` has the reason by node; `unseen` has by node the nodes whose files it did not find.
    """
    findings = []
    if unwritable:
        told = "; ".join(f"{node}: {reason}" for node, reason in unwritable.items())
        findings.append(
            Finding(
                "storage",
                "fault",
                f"output_dir {directory} cannot be written ({told})",
                "Mount storage there that every node may write to, or give another output_dir.",
            )
        )
    blind = {node: others for node, others in unseen.items() if others}
    if blind:
        told = "; ".join(f"{node} does not see {', '.join(at)}" for node, at in blind.items())
        findings.append(
            Finding(
                "storage",
                "fault",
                f"output_dir {directory} is not the same on every node ({told})",
                "Give an output_dir on storage that all nodes share (NFS, a cloud mount).",
            )
        )
    what = f"output_dir {directory} is written and seen by {len(unseen)} node(s)"
    return findings or [Finding("storage", "ok", what)]


def judge_clocks(offsets_s: Mapping[str, tuple[float, float]]) -> Finding:
    """Warn where two nodes' clocks are surely more than `MAX_SKEW_S` apart.

    `offsets_s` has by node how far it is ahead and how far that may be wrong, in seconds.
    """
    low = min((offset + error for offset, error in offsets_s.values()), default=0.0)
    high = max((offset - error for offset, error in offsets_s.values()), default=0.0)
    skew_s = max(0.0, high - low)
    told = "; ".join(f"{node} {offset:+.3f} s" for node, (offset, _) in offsets_s.items())
    if skew_s > MAX_SKEW_S:
        return Finding(
            "clocks",
            "warning",
            f"at least {skew_s:.1f} s apart ({told})",
            "Run NTP (chrony) on every node: log times and timeouts are compared between nodes.",
        )
    return Finding("clocks", "ok", f"within {MAX_SKEW_S:g} s of each other ({told})")


def judge_exchange(
    exchange: Exchange, *, wished_ep_size: int, num_experts: int, memory_gib: float | None
) -> list[Finding]:
    """Judge the measured all-to-all, the topology, and the GPUs' memory where there is any.

    `memory_gib` is what one rank needs at least, where known.
    """
    found = (
        f"{len(exchange.nodes)} workers over {exchange.backend}: {exchange.gb_per_s:.3g} GB/s out "
        f"of each rank, latency {exchange.latency_ms:.3g} ms"
    )
    if not exchange.is_correct:
        broken = "Do not train on this network; look for faulty drivers or links."
        findings = [Finding("all-to-all", "fault", f"{found}; what arrived was wrong", broken)]
    elif exchange.gb_per_s < SLOW_GB_PER_S:
        slow = (
            "Expert parallelism sends every token twice in each layer: use a smaller "
            "parallel.ep_size, or name the fast network in GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME."
        )
        findings = [Finding("all-to-all", "warning", found, slow)]
    else:
        findings = [Finding("all-to-all", "ok", found)]
    findings.append(judge_topology(exchange.nodes, wished_ep_size, num_experts))
    if exchange.device_gib and memory_gib is not None:
        findings.append(_judge_device(exchange.device_gib, memory_gib))
    return findings


def judge_topology(nodes: Sequence[str], wished_ep_size: int, num_experts: int) -> Finding:
    """Warn where an expert group crosses nodes, or the wish does not fit the workers.

    `nodes` has for each rank the id of its node.
    """
    ep_size = fitting_ep_size(len(nodes), num_experts, wished_ep_size)
    topology = Topology(tuple(nodes), ep_size)
    counts = " + ".join(str(count) for count in topology.workers_on_nodes)
    if ep_size != wished_ep_size:
        return Finding(
            "topology",
            "warning",
            f"parallel.ep_size={wished_ep_size} does not divide {len(nodes)} workers and "
            f"{num_experts} experts; it falls to {ep_size}",
            f"Let a multiple of {wished_ep_size} workers be placed.",
        )
    if topology.crossing_groups:
        found, _, remedy = topology.describe_crossing().partition("; a multiple")
        return Finding("topology", "warning", found, f"A multiple{remedy}.")
    alone = f"{counts} workers on the nodes, ep_size {ep_size}: no expert group crosses nodes"
    return Finding("topology", "ok", alone)


def _judge_device(device_gib: float, memory_gib: float) -> Finding:
    found = f"the smallest GPU has {device_gib:.1f} GiB, a rank needs {memory_gib:.1f} at least"
    if memory_gib > device_gib:
        remedy = "Use a higher parallel.zero_stage, a larger parallel.ep_size or larger GPUs."
        return Finding("GPU memory", "fault", found, remedy)
    return Finding("GPU memory", "ok", f"{found}; activations come on top")
