"""Serve a model until it is told to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.errors import MoeDistError
from moe_dist.serving.session import Endpoint, ServingSession, reload_running
from moe_dist.serving.settings import ServingSettings
from moe_dist.serving.stopping import until_stopped
from moe_dist.uris import is_uri

from ..console import Console
from .recipe_settings import recipe_settings


@dataclass(frozen=True)
class Serving:
    """What to serve, and where.

    Args:
        directory: of the model.
        values: of `ServingSettings`, beside those that a recipe says.
        max_length: tokens after which a text is cut; None for the recipe's.
        endpoint: of HTTP.
    """

    directory: str
    values: Mapping[str, Any]
    max_length: int | None = None
    endpoint: Endpoint = field(default_factory=Endpoint)


def run(serving: Serving, console: Console, *, reload: bool = False) -> None:
    """Serve a model until SIGTERM or ctrl-C; SIGHUP loads its directory and settings anew.

    Args:
        serving: what, and where.
        console: shows what happens.
        reload: put the model in the place of one that is served already, and return.
    """
    settings = serving_settings(serving, console)
    if reload:
        _say(console, reload_running(settings))
        return
    with until_stopped() as wait, ServingSession(settings, serving.endpoint, console.note) as own:
        if not _has_begun(own, console):
            return
        host, port = serving.endpoint.host, serving.endpoint.port
        console.result(f"answering at http://{host}:{port}/predict; ctrl-C stops")
        console.note(f"another model in its place: {own.variables} moe-dist serve DIR --reload")
        while wait():
            console.note(f"loading {settings.directory} anew")
            try:
                # The run may have been given another length or threshold meanwhile.
                _say(console, own.deploy(serving_settings(serving, console)))
            except MoeDistError as fault:
                console.warn(str(fault))
        console.note(own.ending)


def _has_begun(own: ServingSession, console: Console) -> bool:
    """Serve for the first time; False for a signal that comes when requests are answered already.

    One that comes earlier is a KeyboardInterrupt.
    """
    try:
        _say(console, own.deploy())
    except KeyboardInterrupt:
        if not own.answers:
            raise
        console.note(own.ending)
        return False
    return True


def serving_settings(serving: Serving, console: Console) -> ServingSettings:
    """Join what is asked with what the model's recipe says; faults are a ConfigError."""
    found, source = recipe_settings(serving.directory, serving.values.get("task"))
    console.note(source)
    if serving.max_length is not None:
        found["max_length"] = serving.max_length
    place = serving.directory
    directory = place if is_uri(place) else str(Path(place).absolute())
    return ServingSettings.of(directory=directory, **serving.values, **found)


def _say(console: Console, found: Mapping[str, Any]) -> None:
    console.note(found["reason"])
    if "task" not in found:
        console.note(f"version {found['version']}")
        return
    limit = found["max_length"]
    cut = "no text is cut" if limit is None else f"texts are cut after {limit} tokens"
    console.note(f"serving {found['task']}, version {found['version']}; {cut}")
