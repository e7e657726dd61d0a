"""The edges of Ray's Jobs API: addresses, exit codes, and a log whose connection breaks."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import jobs
from moe_dist.errors import ClusterError, ConfigError


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("127.0.0.1:8265", "http://127.0.0.1:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("ray://head:10001", "ray://head:10001"),
        ("auto", "auto"),
    ],
)
def test_addresses_are_completed(given: str, normal: str) -> None:
    assert jobs.normal_address(given) == normal


@pytest.mark.parametrize("address", ["", "http://", "//", "http://:8265", "head:99999", "a:b:c"])
def test_an_address_without_a_host_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match=r"--address .* names no host"):
        jobs.normal_address(address)


def test_a_password_in_a_wrong_address_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        jobs.normal_address("ann:planted@head:99999")
    assert "planted" not in str(caught.value)


def test_only_plain_http_to_elsewhere_shows_the_token() -> None:
    assert jobs.sends_token_in_the_clear("http://head:8265")
    assert not jobs.sends_token_in_the_clear("http://127.0.0.1:8265")
    assert not jobs.sends_token_in_the_clear("https://head")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 143),
        ("STOPPED", 130, 130),
    ],
)
def test_the_exit_code_is_the_job_s_own(status: str, code: int | None, expected: int) -> None:
    details: Any = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code)
    assert jobs.exit_code(details) == expected


class BreakingClient:
    """Loses its connection after a while, and begins each log anew, as Ray does."""

    def __init__(self, parts: list[str], ends: list[int]) -> None:
        self.parts = parts
        self.ends = ends

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for part in self.parts[: self.ends.pop(0)]:
            yield part
        if self.ends:
            raise RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_info(self, job_id: str) -> Any:
        if len(self.ends) == 1 and self.parts:
            self.parts = ["".join(self.parts[:2]), *self.parts[2:]]  # cut otherwise this time
        over = not self.ends
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: over))


def test_a_log_is_shown_once_across_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_INTERVAL_S", 0.0)
    shown: list[str] = []
    client: Any = BreakingClient(["one\n", "two\n", "three\n", "four\n"], [1, 3, 4])
    jobs.follow(client, "job", shown.append)
    assert "".join(shown) == "one\ntwo\nthree\nfour\n"


def test_a_cluster_that_stays_away_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job_id: str) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr(jobs, "POLL_INTERVAL_S", 0.0)
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.05)
    with pytest.raises(ClusterError, match="may go on"):
        jobs.wait_for_answer(SimpleNamespace(get_job_info=away), "job")


def test_the_address_given_wins_and_the_environment_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with jobs.cluster_at("http://127.0.0.1:1"):
        from ray.dashboard.utils import get_address_for_submission_client

        assert get_address_for_submission_client("ignored") == "http://127.0.0.1:1"
        with pytest.raises(ClusterError, match="no Ray cluster answers") as caught:
            jobs.connect("http://127.0.0.1:1")
    assert "ssh -L" in caught.value.remedy
    assert jobs.ADDRESS_VARIABLE not in os.environ
