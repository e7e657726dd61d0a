"""A recipe as a job sees it: what of it would not be found there, and the command that runs it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.redaction import hide_secrets
from moe_dist.uris import is_uri

from .lasting import RAY_DIRECTORY, count_nodes, lasting_faults
from .packing import Package

CARRIED_RECIPE = ".moe-dist/recipe.yaml"
"""Where a recipe goes that lies outside the working directory."""
_TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
_PROGRAM = "pipelines/__main__.py"


@dataclass(frozen=True)
class JobRecipe:
    """A recipe with its overrides, as they were given.

    Attributes:
        path: the recipe, absolute.
        overrides: texts such as `moe.top_k=2`.
        settings: both joined, not checked: `read_settings`.
        package: the files that the job gets.
        environment: of the caller, for a tracking URI that the recipe leaves to it.
    """

    path: Path
    overrides: Sequence[str]
    settings: Mapping[str, Any]
    package: Package
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def faults(self) -> list[str]:
        """List what a job could not read, would lose, or must not be told, with remedies."""
        tracking = self._section("tracking")
        uri = self._tracking_uri if tracking.get("enabled", True) else None
        output_dir = str(self.settings.get("output_dir") or "")
        return [
            *lasting_faults(
                output_dir,
                uri,
                temporary=(self.package.root, RAY_DIRECTORY),
                count_nodes=count_nodes,
            ),
            *self._path_faults(),
            *self._source_faults(),
            *(list(_credential_faults(self.settings, uri)) or self._file_faults()),
        ]

    @property
    def command(self) -> str:
        """The job's entry point, for a shell."""
        # A working directory without the source needs an image that has the package installed.
        carried = _PROGRAM in self.package.sizes
        module = "pipelines" if carried else "moe_dist._pipelines"
        words = ["python", "-m", module, "compress", self._name_in_job]
        for text in (*self.overrides, *self._pinned):
            words += ["--set", text]
        return shlex.join(words)

    @property
    def carried(self) -> dict[str, str]:
        """Texts that the package needs besides its files, by their path in the job's directory."""
        if self._name_in_job == CARRIED_RECIPE:
            return {CARRIED_RECIPE: self.path.read_text(encoding="utf-8")}
        return {}

    @property
    def paths_on_cluster(self) -> list[str]:
        """Keys whose files only the cluster may have, so that they cannot be read here."""
        return [key for key, path in self._paths() if path.is_absolute() and not path.exists()]

    @property
    def _name_in_job(self) -> str:
        if self.package.holds(self.path):
            return self.path.relative_to(self.package.root).as_posix()
        return CARRIED_RECIPE

    @property
    def _tracking_uri(self) -> str:
        given = self._section("tracking").get("uri")
        return str(given or self.environment.get(_TRACKING_VARIABLE) or "")

    @property
    def _pinned(self) -> list[str]:
        """What came from the caller's environment, which a job does not have."""
        tracking = self._section("tracking")
        if tracking.get("uri") or not tracking.get("enabled", True):
            return []
        return [f"tracking.uri={self._tracking_uri}"]

    def _section(self, name: str) -> Mapping[str, Any]:
        section: Mapping[str, Any] = self.settings.get(name) or {}
        return section

    def _paths(self) -> Iterator[tuple[str, Path]]:
        """Give the settings that name files or directories, as they were written."""
        data = self._section("data")
        sections = {"data": data}
        if data.get("source") == "tasks":
            sections = {
                f"data.tasks.{task}": own for task, own in (data.get("tasks") or {}).items()
            }
        for name, own in sections.items():
            for key in ("train", "dev") if own.get("source") == "files" else ():
                if own.get(key) and not is_uri(own[key]):
                    yield f"{name}.{key}", Path(own[key])
            further = own.get("unlabelled") or ()
            for place in (further,) if isinstance(further, str) else further:
                if not is_uri(place):
                    yield f"{name}.unlabelled", Path(place)
        teacher = str(self._section("model").get("teacher", ""))
        if teacher.startswith(("/", "~", ".")) or (self.package.root / teacher).is_dir():
            yield "model.teacher", Path(teacher)

    def _file_faults(self) -> Iterator[str]:
        if _is_secret(self.path.read_text(encoding="utf-8")):
            yield (
                f"{self.path.name} is sent as it is, and what --set replaces or a comment holds a "
                "credential that everyone on the cluster could read; take it out of the file."
            )

    def _source_faults(self) -> Iterator[str]:
        # A job imports from its working directory first: half a program hides an installed one.
        sizes = self.package.sizes
        if "moe_dist/__init__.py" in sizes and _PROGRAM not in sizes:
            yield (
                "the working directory would be sent with moe_dist/ and without pipelines/, which "
                "cannot run; send both, or leave both out for an image that has moe-dist installed."
            )

    def _path_faults(self) -> Iterator[str]:
        root = self.package.root
        for key, path in self._paths():
            shown = f"{key}={_without_query(str(path))}"
            if path.parts[:1] and path.parts[0].startswith("~"):
                yield (
                    f"{shown} lies in your home directory, and the job has another; give the "
                    "absolute path of shared storage."
                )
            elif path.is_absolute():
                if path.is_relative_to(root):
                    yield (
                        f"{shown} lies in the working directory, which has another place in the "
                        "job; write it relative, or put it on shared storage."
                    )
            elif not self.package.holds(Path(os.path.normpath(root / path))):
                yield (
                    f"{shown} is not sent with the job (data, results, and what git ignores stay "
                    "here); put it on shared storage and give its absolute path."
                )


def _credential_faults(settings: Mapping[str, Any], uri: str | None) -> Iterator[str]:
    """The command line of a job, and the recipe beside it, are shown to all users of a cluster."""
    if uri is not None and _is_secret(uri):
        yield (
            "tracking.uri holds a user name, password or token, which everyone on the cluster "
            "could read; leave them out, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) on the head node."
        )
    for name in dict.fromkeys(name for name, text in _texts(settings) if _is_secret(text)):
        if name != "tracking.uri":
            yield (
                f"{hide_secrets(name)} holds a credential, which everyone on the cluster could "
                "read; leave it out, and give it to the nodes instead."
            )


def _is_secret(text: str) -> bool:
    return hide_secrets(text) != text


def _texts(settings: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Give every text of nested settings, with its dotted key."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _texts(value, f"{name}.{key}" if name else str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _texts(value, name)
    elif isinstance(settings, str):
        yield name, settings


def _without_query(text: str) -> str:
    return text.partition("?")[0]
