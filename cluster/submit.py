"""`moe-dist submit`: a recipe becomes a job on a cluster, and its end this command's end."""

from __future__ import annotations

import secrets
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_dist.config import RunConfig, load_config, read_settings
from moe_dist.errors import ConfigError
from moe_dist.tracking.privacy import redact_uri

from . import jobs
from .job_recipe import JobRecipe
from .packing import MIB, collect, size_faults, write_package

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

EXIT_INTERRUPTED = 130


@dataclass(frozen=True)
class Submission:
    """What is to be submitted, and how.

    Attributes:
        recipe: the YAML recipe.
        overrides: texts such as `moe.top_k=2`.
        address: the cluster's dashboard.
        max_package_mib: the largest working directory that is sent.
        excludes: patterns of files to leave out, besides `packing.EXCLUDES`.
        wait: follow the job to its end.
        stop_on_interrupt: Ctrl-C stops the job too.
    """

    recipe: Path
    overrides: Sequence[str]
    address: str
    max_package_mib: int
    excludes: Sequence[str] = ()
    wait: bool = True
    stop_on_interrupt: bool = False


def submit(
    submission: Submission,
    *,
    check: Callable[[RunConfig], None],
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> int:
    """Check a recipe, send it with the working directory as a job, and follow the job.

    Args:
        submission: what and how.
        check: raises where the recipe does not fit its data and model, as far as both are here.
        say: shows a line of this command.
        write: shows the job's output, or without waiting its name.

    Returns:
        The job's exit code; 0 without waiting; 130 after Ctrl-C.

    Raises:
        ConfigError: with every fault of the recipe as a job, each with its remedy.
        ClusterError: if the cluster cannot be reached or does not take the job.
    """
    config = load_config(submission.recipe, submission.overrides)
    address = jobs.normal_address(submission.address)
    with jobs.cluster_at(address):
        recipe = _job_recipe(submission)
        faults = recipe.faults() + size_faults(recipe.package, submission.max_package_mib)
        if faults:
            raise ConfigError(faults, source=f"{submission.recipe} as a job on a cluster")
        client = jobs.connect(address)
        if recipe.paths_on_cluster:
            say(f"not here, so checked by the job: {', '.join(recipe.paths_on_cluster)}")
        else:
            check(config)
        submission_id = f"{config.name}-{secrets.token_hex(4)}"
        _send(client, recipe, submission_id, address, say)
        if not submission.wait:
            write(f"{submission_id}\n")
            say(_hints(submission_id, address))
            return 0
        return _follow(client, submission_id, address, submission, say, write)


def _job_recipe(submission: Submission) -> JobRecipe:
    return JobRecipe(
        submission.recipe.absolute(),
        submission.overrides,
        read_settings(submission.recipe, submission.overrides),
        collect(Path.cwd(), submission.excludes),
    )


def _send(
    client: JobSubmissionClient,
    recipe: JobRecipe,
    submission_id: str,
    address: str,
    say: Callable[[str], None],
) -> None:
    if jobs.sends_token_in_the_clear(address):
        say(
            f"the token goes unencrypted to {redact_uri(address)}; `ssh -L` or `ray dashboard` "
            "brings the dashboard to 127.0.0.1, and https does without"
        )
    package = recipe.package
    say(f"sending {len(package.sizes)} files, {package.num_bytes / MIB:.1f} MiB, of {package.root}")
    with tempfile.TemporaryDirectory(prefix="moe-dist-submit-") as directory:
        archive = Path(directory) / "working_dir.zip"
        write_package(package, archive, recipe.carried)
        runtime_env = {
            "working_dir": str(archive),
            # Ray would kill a stopped job after 3 s, before its runs are noted as killed.
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_TIME_S)},
        }
        jobs.send(client, submission_id, recipe.command, runtime_env)
    say(f"job {submission_id} submitted to {redact_uri(address)}")


def _follow(
    client: JobSubmissionClient,
    submission_id: str,
    address: str,
    submission: Submission,
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> int:
    try:
        details = jobs.follow(client, submission_id, write)
    except KeyboardInterrupt:
        if not submission.stop_on_interrupt:
            say(f"the job {submission_id} goes on\n{_hints(submission_id, address)}")
            return EXIT_INTERRUPTED
        say(f"stopping the job {submission_id}")
        details = jobs.stop(client, submission_id)
        say(f"the job {submission_id} has ended: {details.status.value}")
        return EXIT_INTERRUPTED
    if details.driver_exit_code is None and details.message:
        say(details.message)
    say(f"job {submission_id}: {details.status.value}")
    return jobs.exit_code(details)


def _hints(submission_id: str, address: str) -> str:
    at = f"--address {shlex.quote(redact_uri(address))} {submission_id}"
    return (
        f"follow it: RAY_AUTH_MODE=token ray job logs --follow {at}\n"
        f"stop it:   RAY_AUTH_MODE=token ray job stop {at}"
    )
