"""Operators in C++, compiled once for a machine, where it has a compiler."""

from __future__ import annotations

import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.digests import file_digest
from moe_dist.errors import ConversionError, MoeDistError
from moe_dist.whole_files import flush_to_disk

SOURCE = Path(__file__).with_name("routed_ffn.cpp")
_LIBRARY, _DIGEST = "operators.so", "operators.sha256"
_COMPILE_TIMEOUT_S = 600.0

log = logging.getLogger(__name__)


@functools.cache
def load_operators() -> bool:
    """Make `torch.ops.moe_dist.routed_ffn` known; False, and a warning, where it cannot be.

    The first call on a machine compiles for half a minute, with `CXX` or `c++`. The library lies in
    the cache under what it was made of: source, flags, torch, C library and processor; a damaged
    one is built again.
    """
    digests = "-".join(file_digest(path)[:12] for path in (SOURCE, Path(__file__)))
    libc = "-".join(platform.libc_ver())
    made_of = f"{digests}-torch{torch.__version__}-{libc}-{platform.machine()}"
    try:
        directory = build_once(
            default_cache_dir() / "operators" / made_of, _compile, is_good=_is_whole
        )
        torch.ops.load_library(directory / _LIBRARY)
    except (OSError, RuntimeError, subprocess.SubprocessError, MoeDistError) as error:
        log.warning(
            "no native operators here (%s): the lean form uses torch's, which take longer where "
            "tokens are few",
            _reason(error),
        )
        return False
    return True


def _compile(directory: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise ConversionError(
            f"there is no C++ compiler {compiler[0]!r}", remedy="install g++, or name one by CXX"
        )
    log.warning("compiling native operators, once for this machine; it takes half a minute")
    library = directory / _LIBRARY
    command = [
        *(*compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in include_paths()),
        *(str(SOURCE), "-o", str(library)),
        *(f"-L{path}" for path in library_paths()),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
    (directory / _DIGEST).write_text(file_digest(library), encoding="utf-8")
    for path in (library, directory / _DIGEST):
        flush_to_disk(path)


def _is_whole(directory: Path) -> bool:
    library, digest = directory / _LIBRARY, directory / _DIGEST
    if not (library.is_file() and digest.is_file()):
        return False
    return digest.read_text(encoding="utf-8") == file_digest(library)


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    faults = [line for line in said.splitlines() if "error" in line.lower()]
    return " ".join((faults or said.splitlines() or [type(error).__name__])[0].split())
