"""Ray's Jobs API as a terminal uses it: send, follow, stop, and the exit code of the job itself."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moe_dist.errors import ClusterError, ConfigError
from moe_dist.tracking.privacy import redact_uri
from moe_dist.workers.job_errors import first_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
AUTH_VARIABLE = "RAY_AUTH_MODE"
POLL_INTERVAL_S = 1.0
PATIENCE_S = 120.0
"""So long an answer of the cluster may be missing before following it is given up."""
STOP_TIME_S = 30
"""A stopped job has so long to note its runs as killed and to take its workers down."""
_SIGTERM = 15
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def normal_address(address: str) -> str:
    """Complete the address of a cluster's dashboard, which takes jobs.

    Args:
        address: `HOST:PORT`, a URL, `ray://...` or `auto`.

    Returns:
        The address as Ray wants it.

    Raises:
        ConfigError: if it names no host, or a port that cannot be.
    """
    if address == "auto":
        return address
    complete = address if "://" in address else f"http://{address}"
    if not _names_host(complete):
        raise ConfigError(
            [
                f"--address {redact_uri(complete)!r} names no host, or a port that cannot be; give "
                "the dashboard's address, such as http://127.0.0.1:8265."
            ],
            source="submit",
        )
    return complete.rstrip("/")


def sends_token_in_the_clear(address: str) -> bool:
    """Say whether the token would cross a network unencrypted."""
    parts = urlsplit(address)
    return parts.scheme == "http" and parts.hostname not in _LOOPBACK


def _names_host(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


@contextmanager
def cluster_at(address: str) -> Iterator[None]:
    """Let Ray's clients in this process find a cluster, with tokens.

    Args:
        address: of `normal_address`.

    Yields:
        Nothing; the environment is as it was afterwards, except that tokens stay on.
    """
    # Before ray is imported: it reads the mode once. A mode that the user chose stays.
    os.environ.setdefault(AUTH_VARIABLE, "token")
    before = os.environ.get(ADDRESS_VARIABLE)
    # Ray's client would prefer RAY_ADDRESS to the address that it is given.
    os.environ[ADDRESS_VARIABLE] = address
    _quieten_ray()
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


def connect(address: str) -> JobSubmissionClient:
    """Reach the cluster's Jobs API.

    Args:
        address: of `normal_address`; `cluster_at` must be entered.

    Returns:
        Ray's client.

    Raises:
        ClusterError: if nothing answers there, or the token is missing or wrong.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    shown = redact_uri(address)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise ClusterError(
            f"the Ray cluster at {shown} does not accept this token, or got none",
            remedy="Put what `ray get-auth-token` prints on the head node into ~/.ray/auth_token "
            "here, or name a file that holds it in RAY_AUTH_TOKEN_PATH.",
        ) from None
    except (OSError, RuntimeError, ValueError) as fault:
        line = first_line(fault).replace(address, shown)
        raise ClusterError(
            f"no Ray cluster answers at {shown}: {line}",
            remedy="Give the dashboard's address, such as http://127.0.0.1:8265; `ray dashboard "
            "ray_config.yaml` or `ssh -L 8265:127.0.0.1:8265 HEAD` brings it to this machine.",
        ) from fault


def send(
    client: JobSubmissionClient, submission_id: str, command: str, runtime_env: dict[str, Any]
) -> None:
    """Upload the working directory and start the job; a refusal is a ClusterError."""
    try:
        client.submit_job(entrypoint=command, submission_id=submission_id, runtime_env=runtime_env)
    except (OSError, RuntimeError) as fault:
        raise ClusterError(
            f"the cluster did not take the job: {first_line(fault)}",
            remedy="See the head node's dashboard and its logs; nothing was started.",
        ) from fault


def follow(
    client: JobSubmissionClient, submission_id: str, write: Callable[[str], None]
) -> JobDetails:
    """Show a job's output until it ends, also across breaks of the connection.

    A ClusterError, if the cluster stays away, leaves the job running.
    """
    log = _Log(write)
    while True:
        # An error means that the connection broke or the job ended; the status tells which.
        with suppress(OSError, RuntimeError):
            asyncio.run(log.tail(client, submission_id))
        details = wait_for_answer(client, submission_id)
        if details.status.is_terminal():
            return details
        time.sleep(POLL_INTERVAL_S)


def wait_for_answer(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """Ask for a job's state, patiently.

    Args:
        client: of `connect`.
        submission_id: the job.

    Returns:
        Its state.

    Raises:
        ClusterError: if no answer comes for `PATIENCE_S` seconds.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get_job_info(submission_id)
        except (OSError, RuntimeError) as fault:
            if time.monotonic() > deadline_s:
                raise ClusterError(
                    f"the cluster has not answered for {PATIENCE_S:.0f} s; the job "
                    f"{submission_id} may go on",
                    remedy="Look whether the head node runs. The same recipe submitted again "
                    "continues where the job was.",
                ) from fault
        time.sleep(POLL_INTERVAL_S)


def stop(client: JobSubmissionClient, submission_id: str) -> JobDetails:
    """Stop a job and wait until it is down; ClusterError if the cluster does not answer."""
    details = wait_for_answer(client, submission_id)
    if not details.status.is_terminal():
        client.stop_job(submission_id)
    while not details.status.is_terminal():
        time.sleep(POLL_INTERVAL_S)
        details = wait_for_answer(client, submission_id)
    return details


def exit_code(details: JobDetails) -> int:
    """Give the entry point's code; 128 + signal if one ended it, 1 if it never began."""
    status = details.status.value
    if status == "SUCCEEDED":
        return 0
    code: int | None = details.driver_exit_code
    if code is None or code == 0:
        return 128 + _SIGTERM if status == "STOPPED" else 1
    return code if code > 0 else 128 - code


def _quieten_ray() -> None:
    """Show Ray's warnings only; this command says itself what it does."""
    import ray  # noqa: F401  (gives its logger a handler)

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)


class _Log:
    """The output of one job, of which every part is written once.

    Args:
        write: takes the output.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._num_written = 0

    async def tail(self, client: JobSubmissionClient, submission_id: str) -> None:
        """Write what comes; Ray begins at the start each time it is asked."""
        position = 0
        async for text in client.tail_job_logs(submission_id):
            new = text[max(0, self._num_written - position) :]
            position += len(text)
            if new:
                self._write(new)
                self._num_written = position
