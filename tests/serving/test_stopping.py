"""What signals do while a server waits, and while it does not."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from moe_dist.serving.stopping import until_stopped


def test_signals_come_one_by_one_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with until_stopped() as wait:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        assert [wait(), wait()] == [True, True]
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert wait() is False
    assert signal.getsignal(signal.SIGTERM) is before


def signal_self(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_nobody_waits_for_ends_what_is_done(number: int) -> None:
    with pytest.raises(KeyboardInterrupt), until_stopped():
        signal_self(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_what_the_first_began(number: int) -> None:
    with until_stopped() as wait:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        assert wait() is False
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt, match="may be without an answer"):
                signal_self(number)
