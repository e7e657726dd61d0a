"""Looks at a Ray cluster before a run: worker slots, versions, storage, clocks, network, token."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from typing import Any

from moe_dist.config import RunConfig
from moe_dist.errors import ClusterError, MoeDistError
from moe_dist.workers.cluster_capacity import Capacity, describe_nodes, read_capacity
from moe_dist.workers.driver import run_on_workers
from moe_dist.workers.placement import Placement, choose_placement
from moe_dist.workers.ray_session import RaySession
from moe_dist.workers.worker_cpus import worker_cpus

from .exchange import Exchange, exchange_job
from .findings import Finding, judge_clocks, judge_exchange, judge_versions
from .probing import ask, check_storage, measure_clocks, remove_below, start_probes

EXCHANGE_BYTES = 16 << 20


@dataclass(frozen=True)
class Scope:
    """What a preflight is about.

    Args:
        config: the run's configuration.
        session: connected to the cluster, or about to start one.
        memory_gib: what one rank needs at least, activations not counted; None if not known.
    """

    config: RunConfig
    session: RaySession
    memory_gib: float | None = None


def check_cluster(scope: Scope, *, compare_one: bool = True) -> list[Finding]:
    """Check what costs seconds: worker slots, and on several nodes versions, storage and clocks.

    Args:
        scope: recipe and cluster.
        compare_one: ask a cluster's only node too; a chain that runs there finds out by itself.

    Returns:
        Findings, faults among them.

    Raises:
        ClusterError: if the cluster cannot be reached.
    """
    scope.session.connect()
    capacity = read_capacity()
    findings = check_slots(scope, capacity)
    findings.append(check_token(len(capacity.nodes)))
    findings += check_tracking(scope.config, len(capacity.nodes))
    if len(capacity.nodes) == 1 and not compare_one:
        return findings
    probes, findings_of_nodes = start_probes(capacity.nodes)
    findings += findings_of_nodes
    findings += judge_versions(ask(probes, "versions"))
    findings += check_storage(probes, scope.config.output_dir)
    findings.append(judge_clocks(measure_clocks(probes)))
    return findings


def check_slots(scope: Scope, capacity: Capacity) -> list[Finding]:
    """Check that the workers have CPUs, GPUs and memory, now or later."""
    parallel = scope.config.parallel
    use_gpu = None if parallel.use_gpu == "auto" else parallel.use_gpu
    try:
        placement = choose_placement(capacity, parallel.num_workers, worker_cpus(parallel), use_gpu)
    except ClusterError as error:
        return [Finding("workers", "fault", error.message, error.remedy)]
    free = capacity.free_slots(placement.need)
    found = (
        f"{placement.wish}, {placement.need} each; {min(free, placement.most)} fit now "
        f"(free: {describe_nodes(capacity, free=True)})"
    )
    if free < placement.least:
        remedy = (
            f"The run will wait up to parallel.wait_s={parallel.wait_s:g} s for worker slots that "
            "are held or still to come; see `ray status`."
        )
        findings = [Finding("workers", "warning", found, remedy)]
    else:
        findings = [Finding("workers", "ok", found)]
    return findings + check_memory(capacity, placement, scope.memory_gib)


def check_memory(
    capacity: Capacity, placement: Placement, memory_gib: float | None
) -> list[Finding]:
    """Check that the nodes have memory for their workers, where their need is known."""
    if memory_gib is None or placement.need.gpus:
        return []
    need = placement.need
    with_memory = sum(
        min(need.slots(node.cpus, node.gpus), int(node.memory_gib / max(memory_gib, 1e-9)))
        for node in capacity.nodes
    )
    wanted = min(placement.least, capacity.present_slots(need))
    nodes = "; ".join(f"{node.address}: {node.memory_gib:.1f} GiB" for node in capacity.nodes)
    found = f"a rank needs {memory_gib:.2f} GiB and activations; nodes have {nodes}"
    if with_memory < wanted:
        remedy = (
            "Use a higher parallel.zero_stage, a larger parallel.ep_size, fewer workers on a node "
            "(parallel.cpus_per_worker) or nodes with more memory."
        )
        return [Finding("memory", "fault", found, remedy)]
    return [Finding("memory", "ok", found)]


def check_token(num_nodes: int) -> Finding:
    """Warn where anyone who reaches the cluster may run code; the token is never read."""
    from ray import _raylet

    mode: Any = _raylet  # Compiled, so its stub knows little.
    if mode.get_authentication_mode() != mode.AuthenticationMode.DISABLED:
        return Finding("token", "ok", "Ray asks for its token")
    where = "" if num_nodes == 1 else f" on {num_nodes} nodes"
    return Finding(
        "token",
        "warning",
        f"token authentication is off{where}: whoever reaches Ray's ports runs code there",
        "Start Ray with RAY_AUTH_MODE=token; `ray get-auth-token --generate` makes a token.",
    )


def check_tracking(config: RunConfig, num_nodes: int) -> list[Finding]:
    """Check that what is recorded outlives the run; an sqlite file on many nodes may not."""
    tracking = config.tracking
    if not tracking.enabled or num_nodes == 1 or not tracking.uri.startswith("sqlite"):
        return []
    is_submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    found = "the MLflow store is an sqlite file" + (
        " in a submitted job's temporary directory or on one node" if is_submitted else ""
    )
    remedy = "Set tracking.uri to the address of an MLflow server."
    return [Finding("tracking", "fault" if is_submitted else "warning", found, remedy)]


def check_exchange(scope: Scope) -> list[Finding]:
    """Start the recipe's workers as a run would, and let them exchange rows."""
    config, parallel = scope.config, scope.config.parallel
    if parallel.max_workers == 1:
        return [Finding("all-to-all", "ok", "one worker, which sends nothing to anyone")]
    name = f".preflight-{secrets.token_hex(4)}"
    try:
        result = run_on_workers(
            exchange_job,
            {"num_bytes": EXCHANGE_BYTES},
            num_workers=parallel.num_workers,
            cpus_per_worker=worker_cpus(parallel),
            use_gpu=None if parallel.use_gpu == "auto" else parallel.use_gpu,
            max_failures=0,
            wait_s=parallel.wait_s,
            launcher="ray",
            storage_path=config.output_dir,
            name=name,
            session=scope.session,
        )
    except MoeDistError as error:
        return [Finding("all-to-all", "fault", error.message, error.remedy)]
    finally:
        remove_below(config.output_dir, name)
    return judge_exchange(
        Exchange(**result.value),
        wished_ep_size=parallel.ep_size,
        num_experts=config.moe.num_experts,
        memory_gib=scope.memory_gib,
    )
