"""Asks every node of a cluster, through a probe that is put on each of them."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moe_dist.errors import ClusterError, StorageError
from moe_dist.made_directories import MadeDirectories
from moe_dist.storage import Store, delete_tree
from moe_dist.uris import join_uri, redact_uri
from moe_dist.workers.cluster_capacity import Node
from moe_dist.workers.job_errors import first_line

from .findings import Finding, judge_storage

ANSWER_S = 120.0
"""How long a node may take to start a process and answer."""
NUM_PINGS = 5

Probes = Mapping[str, Any]
"""By the node's name, the actor that answers for it."""


def start_probes(nodes: Sequence[Node]) -> tuple[dict[str, Any], list[Finding]]:
    """Put a probe on every node.

    Args:
        nodes: of the cluster.

    Returns:
        Probes by the node's name, and a fault for each node that does not answer.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from . import node_probe

    cloudpickle.register_pickle_by_value(node_probe)
    try:
        remote = ray.remote(num_cpus=0)(node_probe.NodeProbe)
        probes = {
            name: remote.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            ).remote()
            for name, node in name_nodes(nodes).items()
        }
        starting = {probe.time_s.remote(): name for name, probe in probes.items()}
        ray.wait(list(starting), num_returns=len(starting), timeout=ANSWER_S)
    finally:
        cloudpickle.unregister_pickle_by_value(node_probe)
    silent = {}
    for answer, name in starting.items():
        try:
            ray.get(answer, timeout=0)
        except (ray.exceptions.RayError, TimeoutError) as fault:
            silent[name] = first_line(fault)
    findings = [
        Finding(
            "nodes",
            "fault",
            f"{name} does not run a process of ours: {reason}",
            "See the log of its raylet; remove the node or start Ray on it anew.",
        )
        for name, reason in silent.items()
    ]
    return {name: probe for name, probe in probes.items() if name not in silent}, findings


def name_nodes(nodes: Sequence[Node]) -> dict[str, Node]:
    """Name nodes by their addresses, and several on one address by their ids too.

    Args:
        nodes: of the cluster.

    Returns:
        The nodes by name, in the order of their names.
    """
    addresses = [node.address for node in nodes]
    named = {
        node.address
        if addresses.count(node.address) == 1
        else f"{node.address}#{node.node_id[:6]}": node
        for node in nodes
    }
    return dict(sorted(named.items()))


def ask(probes: Probes, question: str, *arguments: Any) -> dict[str, Any]:
    """Ask all nodes at once; `question` is a method of `NodeProbe`, the answers come by node."""
    answers = {name: getattr(probe, question).remote(*arguments) for name, probe in probes.items()}
    return {name: _wait_for(name, answer) for name, answer in answers.items()}


def _wait_for(name: str, answer: Any) -> Any:
    """Wait for the answer of a node that answered before."""
    import ray

    try:
        return ray.get(answer, timeout=ANSWER_S)
    except ray.exceptions.RayError as fault:
        raise ClusterError(
            f"{name} stopped answering: {first_line(fault)}",
            remedy="See `ray status` and the log of its raylet, then try again.",
        ) from fault


def check_storage(probes: Probes, output_dir: Path | str) -> list[Finding]:
    """Let every node write a file and look for those of the others.

    Args:
        probes: by node.
        output_dir: where results go; a directory, or a URI as text.

    Returns:
        See `judge_storage`.
    """
    shown, name = redact_uri(str(output_dir)), f".preflight-{secrets.token_hex(4)}"
    directory = path_below(output_dir, name)
    made = MadeDirectories()
    try:
        if isinstance(output_dir, Path):
            made.make(Path(directory))
    except OSError as fault:
        made.remove_if_empty()
        return judge_storage(shown, {"this process": fault.strerror or str(fault)}, {})
    try:
        # The names are no secret, and neither are these tokens.
        files = {name: (f"node-{i}", secrets.token_hex(8)) for i, name in enumerate(probes)}
        written = {
            name: probe.write_token.remote(directory, *files[name])
            for name, probe in probes.items()
        }
        reasons = {name: _wait_for(name, answer) for name, answer in written.items()}
        unwritable = {name: reason for name, reason in reasons.items() if reason}
        tokens = dict(files[name] for name in probes if name not in unwritable)
        owners = {file: name for name, (file, _) in files.items()}
        unseen = ask(probes, "read_tokens", directory, tokens)
        named = {name: [owners[file] for file in missing] for name, missing in unseen.items()}
    finally:
        remove_below(output_dir, name)
        made.remove_if_empty()
    return judge_storage(shown, unwritable, named)


def path_below(output_dir: Path | str, name: str) -> str:
    """Name a directory among the results, which lie at a path or a URI."""
    return str(output_dir / name) if isinstance(output_dir, Path) else join_uri(output_dir, name)


def remove_below(output_dir: Path | str, name: str) -> None:
    """Remove a directory from among the results, where that can be done."""
    if isinstance(output_dir, Path):
        shutil.rmtree(output_dir / name, ignore_errors=True)
        return
    with suppress(StorageError):
        delete_tree(Store(output_dir), name)


def measure_clocks(
    probes: Probes, clock: Callable[[], float] = time.time
) -> dict[str, tuple[float, float]]:
    """Compare the nodes' clocks with this process's.

    Args:
        probes: by node.
        clock: this process's.

    Returns:
        By node, how far its clock is ahead, and how far that may be wrong, in seconds.
    """
    offsets = {}
    for name, probe in probes.items():
        pings = []
        for _ in range(NUM_PINGS):
            asked = clock()
            told = _wait_for(name, probe.time_s.remote())
            answered = clock()
            pings.append(((answered - asked) / 2, told - (asked + answered) / 2))
        error, offset = min(pings)
        offsets[name] = (offset, error)
    return offsets
