"""The package that a job carries: the working directory without data, results and caches."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
NUM_NAMED = 3
"""So many of the biggest folders are named when a package is too large."""

# As in a .gitignore. A slash in front: only at the top, since moe_dist/data is source.
EXCLUDES = (
    *("/data", "/outputs", "/mlruns", "/mlartifacts", "mlflow.db*"),
    *(".git", ".venv", "/venv", "__pycache__", "*.pyc", "*.egg-info", "/build", "/dist"),
    *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache", ".ipynb_checkpoints"),
    # Credentials do not belong on a cluster's disks, whether git knows them or not.
    *(".env", ".env.*", ".netrc", ".aws", ".ssh", "*.pem", "*.key", "auth_token"),
)


@dataclass(frozen=True)
class Package:
    """The files of a working directory that a job gets.

    Attributes:
        root: the working directory.
        sizes: bytes of each file, by its path below `root`.
        excludes: the patterns that were left out, besides those in `.gitignore` and `.rayignore`.
    """

    root: Path
    sizes: Mapping[str, int]
    excludes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """What is sent; Ray does not compress it."""
        return sum(self.sizes.values())

    def holds(self, path: Path) -> bool:
        """Say whether an absolute path, or something below it, is among the files."""
        if not path.is_relative_to(self.root):
            return False
        name = path.relative_to(self.root).as_posix()
        return name in self.sizes or any(known.startswith(f"{name}/") for known in self.sizes)

    def biggest(self) -> list[tuple[str, int]]:
        """Name the biggest entries at the top, with their bytes, the biggest first."""
        tops: Counter[str] = Counter()
        for name, size in self.sizes.items():
            tops[name.partition("/")[0]] += size
        return tops.most_common(NUM_NAMED)


def collect(root: Path, excludes: Sequence[str] = ()) -> Package:
    """Find the files of a working directory that a job gets.

    Args:
        root: the working directory.
        excludes: further patterns to leave out, as in a `.gitignore`.

    Returns:
        The files with their sizes; nothing is read yet.
    """
    # What Ray itself walks with, so that what is measured here is what it sends.
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    patterns = (*EXCLUDES, *excludes)
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(root).as_posix()] = path.stat().st_size

    _dir_travel(root, [_get_excludes(root, list(patterns))], note, include_gitignore=True)
    return Package(root, sizes, patterns)


def size_faults(package: Package, max_mib: int) -> list[str]:
    """Say what makes a package too large to be sent, naming the biggest folders."""
    if package.num_bytes <= max_mib * MIB:
        return []
    biggest = ", ".join(f"{name} ({size / MIB:.0f} MiB)" for name, size in package.biggest())
    return [
        f"the working directory would send {package.num_bytes / MIB:.0f} MiB, and the limit is "
        f"{max_mib} MiB; the biggest are {biggest}; leave some out with --exclude NAME or "
        f".gitignore, move data to shared storage, or raise --max-package-mib."
    ]


def write_package(package: Package, target: Path, extra: Mapping[str, str]) -> None:
    """Write the archive that Ray unpacks on each node.

    Args:
        package: the files.
        target: where the archive goes; ends with .zip.
        extra: texts to add, by their path in the job's directory.
    """
    from ray._private.runtime_env.packaging import create_package

    create_package(
        str(package.root), target, include_gitignore=True, excludes=list(package.excludes)
    )
    with zipfile.ZipFile(target, "a") as archive:
        for name, text in extra.items():
            archive.writestr(name, text)
