"""Operators in C++, compiled once for a machine, where it has a compiler."""

from __future__ import annotations

import functools
import logging
import os
import platform
import subprocess
from pathlib import Path

import torch

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.digests import file_digest
from moe_dist.errors import MoeDistError

SOURCE = Path(__file__).with_name("routed_ffn.cpp")
_LIBRARY = "operators.so"
_COMPILE_TIMEOUT_S = 600.0

log = logging.getLogger(__name__)


@functools.cache
def load_operators() -> bool:
    """Make `torch.ops.moe_dist.routed_ffn` known; False, and a warning, where it cannot be.

    The first call on a machine compiles for half a minute, with `CXX` or `c++`. The library lies in
    the cache under what it was made of: source, torch and processor.
    """
    made_of = f"{file_digest(SOURCE)[:16]}-torch{torch.__version__}-{platform.machine()}"
    try:
        directory = build_once(
            default_cache_dir() / "operators" / made_of,
            _compile,
            is_good=lambda path: (path / _LIBRARY).is_file(),
        )
        torch.ops.load_library(directory / _LIBRARY)
    except (OSError, RuntimeError, subprocess.SubprocessError, MoeDistError) as error:
        log.warning(
            "no native operators here (%s): the lean form uses torch's, which take longer where "
            "tokens are few; a C++ compiler (g++) is all that they want",
            _reason(error),
        )
        return False
    return True


def _compile(directory: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    log.warning("compiling native operators, once for this machine; it takes half a minute")
    command = [
        *(os.environ.get("CXX", "c++"), "-std=c++20", "-O2", "-fPIC", "-shared", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in include_paths()),
        *(str(SOURCE), "-o", str(directory / _LIBRARY)),
        *(f"-L{path}" for path in library_paths()),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or str(error)
    faults = [line for line in said.splitlines() if "error" in line.lower()]
    return (faults or said.splitlines() or [type(error).__name__])[0].strip()
