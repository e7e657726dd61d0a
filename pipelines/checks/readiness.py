"""The cheap part of preflight, which a chain on a cluster does by itself."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from moe_dist.errors import ClusterError

from .cluster_package import cluster_module

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

    from ..chain.workspace import Workspace


def check_cluster_once(config: RunConfig, workspace: Workspace) -> None:
    """Check the cluster before a chain's first job; a ClusterError names every fault.

    On this machine alone there is nothing to compare; its CPUs and GPUs are counted for each
    job.
    """
    session = workspace.session
    is_local = config.parallel.launcher == "local" or not os.environ.get("RAY_ADDRESS")
    if is_local or session is None or workspace.is_cluster_checked:
        return
    checks = cluster_module("preflight")
    workspace.is_cluster_checked = True
    findings = checks.check_cluster(checks.Scope(config, session), compare_one=False)
    for finding in findings:
        if finding.state == "warning":
            workspace.console.warn(f"{finding.check}: {finding.found}. {finding.remedy}")
    faults = [finding for finding in findings if finding.state == "fault"]
    if faults:
        lines = "\n".join(f"  - {fault.check}: {fault.found}. {fault.remedy}" for fault in faults)
        noun = "fault" if len(faults) == 1 else "faults"
        raise ClusterError(
            f"the cluster is not ready for this run: {len(faults)} {noun}\n{lines}",
            remedy="`moe-dist preflight` with the same arguments checks it again.",
        )
