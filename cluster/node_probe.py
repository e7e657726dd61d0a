"""What one node tells about itself: an actor that is sent to it by value.

The node may lack this source tree, or hold another version of it; finding that out is the point. So
this file uses nothing but the standard library, except to reach a URI.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import time
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "ray", "deepspeed", "transformers")
MISSING = "missing"


class NodeProbe:
    """Answers questions about the node that it runs on."""

    def versions(self) -> dict[str, str]:
        """Name what is installed: Python, the packages that matter, and a digest of our source."""
        found = {"python": platform.python_version()}
        for package in PACKAGES:
            try:
                found[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                found[package] = MISSING
        return found | {"moe_dist source": source_digest()}

    def write_token(self, directory: str, name: str, token: str) -> str:
        """Write a file that the other nodes are to find; give what went wrong, or ""."""
        try:
            _write(directory, name, token.encode())
        except Exception as fault:  # Whatever this node lacks is what is asked for.
            return getattr(fault, "strerror", "") or str(fault).splitlines()[0]
        return ""

    def read_tokens(self, directory: str, tokens: dict[str, str]) -> list[str]:
        """Name the files of `tokens` (content by name) that are missing or differ."""
        missing = []
        for name, token in tokens.items():
            try:
                if _read(directory, name) != token.encode():
                    missing.append(name)
            except Exception:  # As above; the reason was told when this node wrote its own.
                missing.append(name)
        return missing

    def time_s(self) -> float:
        """Read the node's clock, in seconds."""
        return time.time()


def _write(directory: str, name: str, content: bytes) -> None:
    if "://" in directory:
        from moe_dist.storage import Store

        Store(directory).write(name, content)
    else:
        Path(directory, name).write_bytes(content)


def _read(directory: str, name: str) -> bytes | None:
    if "://" in directory:
        from moe_dist.storage import Store

        return Store(directory).read(name)
    return Path(directory, name).read_bytes()


def source_digest() -> str:
    """Hash the Python files of moe_dist that this process would import.

    Returns:
        The first digits of a SHA-256 over names and contents; `missing` where there are none.
    """
    spec = importlib.util.find_spec("moe_dist")
    if spec is None or not spec.submodule_search_locations:
        return MISSING
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
