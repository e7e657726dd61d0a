"""The launcher files: accepted by Ray as they stand, pinned like the rest, and no port too wide."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.lasting import RAY_DIRECTORY

ROOT = Path(__file__).resolve().parents[2]
FILES = ("ray_config.yaml", "cluster/on_premise.yaml")
COMMANDS = ("initialization_commands", "setup_commands")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pinned(package: str) -> str:
    pins = text("constraints.txt").splitlines()
    return next(pin.partition("==")[2] for pin in pins if pin.startswith(f"{package}=="))


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def prepared(name: str) -> dict[str, Any]:
    """The file as `ray up` sees it: checked against Ray's schema, defaults filled in."""
    pytest.importorskip("jsonschema")
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load(text(name)))
    validate_config(config)
    return config


def test_ray_up_accepts_the_file(prepared: dict[str, Any]) -> None:
    types = prepared["available_node_types"]
    assert prepared["head_node_type"] in types
    for kind in types.values():
        assert 0 <= kind["min_workers"] <= kind["max_workers"] <= prepared["max_workers"]
    assert prepared["max_workers"] > 0


def test_a_wrong_file_is_refused() -> None:
    """The check above can fail."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    wrong = yaml.safe_load(text("ray_config.yaml")) | {"max_worker": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(prepare_config(wrong))


def test_each_placeholder_stands_in_one_block_at_the_top_and_is_used(name: str) -> None:
    content = text(name)
    block = content[content.index("metadata:") : content.index("provider:")]
    anchors = re.findall(r"&(\w+)", block)
    assert set(yaml.safe_load(content)["metadata"]["placeholders"]) == set(anchors)
    below = content[content.index("provider:") :]
    for anchor in anchors:
        assert re.search(rf"\*{anchor}\b", below), anchor
    for made_up in ("00000000", "192.0.2."):
        assert made_up not in below


def test_all_nodes_get_the_pinned_versions(prepared: dict[str, Any]) -> None:
    for role in ("head", "worker"):
        installing = " ".join(prepared[f"{role}_setup_commands"])
        assert "--constraint constraints.txt" in " ".join(installing.split())
    images = re.findall(r"rayproject/ray:([\w.-]+)", str(prepared))
    assert all(re.fullmatch(rf"{pinned('ray')}-py311(-gpu)?", image) for image in images)
    if prepared["provider"]["type"] == "aws":
        assert len(images) == 2


def test_storage_is_mounted_and_the_token_travels(prepared: dict[str, Any]) -> None:
    assert "mountpoint -q /shared" in " ".join(prepared["initialization_commands"])
    if prepared["provider"]["type"] == "aws":
        assert "--volume /shared:/shared" in prepared["docker"]["run_options"]
    assert not Path("/shared").is_relative_to(RAY_DIRECTORY)
    tokens = [remote for remote in prepared["file_mounts"] if remote.endswith(".ray/auth_token")]
    assert len(tokens) == 1
    for role in ("head", "worker"):
        start = prepared[f"{role}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start and "ray start" in start


def test_no_port_is_open_wider_than_needed(prepared: dict[str, Any]) -> None:
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]
    assert "0.0.0.0" not in str(prepared)
    if prepared["provider"]["type"] == "aws":
        # Without a group of the user's own, Ray makes one that lets the Internet try SSH.
        for kind in prepared["available_node_types"].values():
            assert kind["node_config"]["SecurityGroupIds"]


def test_results_caches_and_secrets_are_not_synchronised(prepared: dict[str, Any]) -> None:
    assert {".venv/", ".git/", "outputs/", ".env*"} <= set(prepared["rsync_exclude"])
