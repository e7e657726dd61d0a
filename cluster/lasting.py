"""What outlives a job: Ray runs it in a temporary copy of the working directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.errors import ConfigError
from moe_dist.uris import is_uri, sqlite_path

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
RAY_DIRECTORY = Path("/tmp/ray")
_COPIES = "runtime_resources"
_GIVE_STORAGE = (
    "name storage that all nodes share and that outlives the job, for example "
    "--set output_dir=/shared/outputs."
)
_GIVE_SERVER = (
    "name a tracking server that the head node reaches, for example "
    "--set tracking.uri=http://HOST:5000, or do without with --set tracking.enabled=false."
)


def in_ray_job() -> bool:
    """Say whether this process is the entry point of a submitted job."""
    return JOB_VARIABLE in os.environ


def temporary_directories() -> tuple[Path, ...]:
    """List what ends with this job: its working directory and Ray's own ones."""
    here = Path.cwd()
    sessions = [parent.parent for parent in here.parents if parent.name == _COPIES]
    return (here, RAY_DIRECTORY, *sessions)


def check_job(config: RunConfig) -> None:
    """Insist, inside a job, that results and records outlive it.

    Args:
        config: the run's configuration, with paths as the job sees them.

    Raises:
        ConfigError: with a remedy for each of `output_dir` and `tracking.uri` that would be lost.
    """
    faults = lasting_faults(
        str(config.output_dir),
        config.tracking.uri if config.tracking.enabled else None,
        temporary=temporary_directories(),
        count_nodes=count_nodes,
    )
    if faults:
        raise ConfigError(faults, source=f"{config.name} as a job on a cluster")


def lasting_faults(
    output_dir: str,
    tracking_uri: str | None,
    *,
    temporary: Sequence[Path],
    count_nodes: Callable[[], int],
) -> list[str]:
    """Find what of a run would be lost when its job ends, one line with remedy each.

    `output_dir` and `tracking_uri` are as given, empty if not given; a `tracking_uri` of None means
    that tracking is off. `count_nodes` is asked only where the answer matters.
    """
    faults = list(_output_faults(output_dir, temporary))
    if tracking_uri is not None:
        faults += _tracking_faults(tracking_uri, temporary, count_nodes)
    return faults


def count_nodes() -> int:
    """Count the nodes of the cluster that `RAY_ADDRESS` or `RAY_API_SERVER_ADDRESS` names."""
    from ray.util.state import list_nodes

    return len(list_nodes(filters=[("state", "=", "ALIVE")]))


def _output_faults(output_dir: str, temporary: Sequence[Path]) -> Iterator[str]:
    location = output_dir.removeprefix("file://")
    if not location:
        yield f"output_dir is not given, and a job's own directory ends with it; {_GIVE_STORAGE}"
    elif not is_uri(location):
        why = _why_lost(location, temporary)
        if why:
            yield f"output_dir={output_dir} {why}; {_GIVE_STORAGE}"


def _tracking_faults(
    uri: str, temporary: Sequence[Path], count_nodes: Callable[[], int]
) -> Iterator[str]:
    if not uri:
        yield f"tracking.uri is not given, and a job's own database ends with it; {_GIVE_SERVER}"
    # A driver may follow the dialect, as in sqlite+pysqlite.
    if uri.partition(":")[0].partition("+")[0] != "sqlite":
        return
    why = _why_lost(sqlite_path(uri) or "", temporary)
    if why:
        yield f"tracking.uri={uri} {why}; {_GIVE_SERVER}"
    elif (num_nodes := count_nodes()) > 1:
        yield (
            f"tracking.uri={uri} is a file for one machine, and the cluster has {num_nodes} "
            f"nodes; {_GIVE_SERVER}"
        )


def _why_lost(path: str, temporary: Sequence[Path]) -> str:
    if not os.path.isabs(path):
        return "is not an absolute path, and a job runs in a temporary copy of this directory"
    normal = Path(os.path.normpath(path))
    for directory in temporary:
        if normal.is_relative_to(directory):
            return f"lies in {directory}, which does not outlive the job"
    return ""
