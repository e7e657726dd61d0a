"""The fixture itself: hosts that reach each other, a cable that can be pulled, nothing left."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.hosts.network import INTERFACE, Host, TwoHosts, ip, run_on

pytestmark = pytest.mark.hosts

LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], 7000))
print("ready", flush=True)
while True:
    listener.accept()[0].close()
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=1)"


def reaches(host: Host, other: Host) -> bool:
    command = host.command(sys.executable, "-c", CONNECT, other.address)
    return subprocess.run(command, capture_output=True, timeout=30).returncode == 0


def test_hosts_talk_until_the_cable_is_pulled(two_hosts: TwoHosts) -> None:
    a, b = two_hosts.a, two_hosts.b
    command = (sys.executable, "-c", LISTEN, b.address)
    with run_on(b, command, stdout=subprocess.PIPE) as listener:
        try:
            assert listener.stdout.readline() == b"ready\n"
            assert reaches(a, b)
            two_hosts.set_cable(b, plugged=False)
            assert not reaches(a, b)
            two_hosts.set_cable(b, plugged=True)
            assert reaches(a, b)
            assert not reaches(a, two_hosts.switch)  # nothing listens there
        finally:
            b.end_all()
    assert b.pids() == []


def test_nothing_is_left_and_the_machine_sees_nothing() -> None:
    with TwoHosts() as hosts:
        run_on(hosts.a, (sys.executable, "-c", "import time; time.sleep(600)"))
        assert INTERFACE in ip("-n", hosts.a.namespace, "link")
        assert INTERFACE not in {name for _, name in socket.if_nameindex()}
    left = ip("netns", "list")
    assert not any(host.namespace in left for host in (hosts.a, hosts.b, hosts.switch))
