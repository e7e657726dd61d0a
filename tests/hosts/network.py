"""Two hosts on one machine: network namespaces whose cables meet in a switch.

The switch is a bridge in a third namespace, so nothing of it shows in the machine's own network,
and what runs in a namespace can be listed, and ended, without touching anything else.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

PREFIX = "mdt"
SUBNET = "10.77.0"
INTERFACE = "mdt0"
STOP_TIMEOUT_S = 10.0


def ip(*arguments: str) -> str:
    """Run iproute2 and return what it prints."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def why_not() -> str | None:
    """Say why this machine can have no two hosts; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2 (`ip`)"
    name = f"{PREFIX}-{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "probe", "type", "bridge")
            ip("-n", name, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
        finally:
            ip("netns", "delete", name)
    except OSError as fault:
        return f"this machine makes no network namespaces: {fault}"
    return None


@dataclass(frozen=True)
class Host:
    """A network namespace with one address.

    Args:
        namespace: its name.
        address: its IPv4 address.
    """

    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """Return a command line that runs another one on this host."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    def pids(self) -> list[int]:
        """Return all processes of this host."""
        return [int(line) for line in ip("netns", "pids", self.namespace).split()]

    def end_all(self) -> None:
        """Kill every process of this host, and wait until they are gone."""
        until = time.monotonic() + STOP_TIMEOUT_S
        while (pids := self.pids()) and time.monotonic() < until:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)


class TwoHosts:
    """Hosts `a` and `b`, and the `switch` between them, which is a host too.

    Removes on leaving what it made, and on entering what a killed process of this name left.
    """

    def __init__(self) -> None:
        run = f"{PREFIX}-{os.getpid()}-{secrets.token_hex(2)}"
        self.a = Host(f"{run}-a", f"{SUBNET}.1")
        self.b = Host(f"{run}-b", f"{SUBNET}.2")
        self.switch = Host(f"{run}-s", f"{SUBNET}.254")

    def __enter__(self) -> TwoHosts:
        _remove_orphans()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def set_cable(self, host: Host, *, plugged: bool) -> None:
        """Pull a host's cable out of the switch, or plug it in."""
        ip("-n", self.switch.namespace, "link", "set", _port(host), "up" if plugged else "down")

    def _build(self) -> None:
        switch = self.switch.namespace
        for host in (self.switch, self.a, self.b):
            ip("netns", "add", host.namespace)
            ip("-n", host.namespace, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", INTERFACE, "type", "bridge")
        for host in (self.a, self.b):
            end = ("peer", "name", INTERFACE, "netns", host.namespace)
            ip("-n", switch, "link", "add", _port(host), "type", "veth", *end)
            ip("-n", switch, "link", "set", _port(host), "master", INTERFACE, "up")
        for host in (self.switch, self.a, self.b):
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            ip("-n", host.namespace, "link", "set", INTERFACE, "up")

    def _remove(self) -> None:
        for host in (self.a, self.b, self.switch):
            with suppress(OSError):
                host.end_all()
            with suppress(OSError):
                # The bridge and the cables go with the namespaces they lie in.
                ip("netns", "delete", host.namespace)


def _port(host: Host) -> str:
    return f"port-{host.namespace[-1]}"


def _remove_orphans() -> None:
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(f"{PREFIX}-").partition("-")[0]
        if name.startswith(f"{PREFIX}-") and owner.isdigit() and not _lives(int(owner)):
            Host(name, "").end_all()
            ip("netns", "delete", name)


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def run_on(host: Host, arguments: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
    """Start a command on a host, in a session of its own."""
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        host.command(*arguments), start_new_session=True, **options
    )
