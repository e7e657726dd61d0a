"""Operators in C++, compiled once for a machine, where it has a compiler."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from moe_dist.data.cache import build_once, default_cache_dir
from moe_dist.digests import file_digest
from moe_dist.errors import ConversionError, MoeDistError
from moe_dist.moe.native_experts import count_flops
from moe_dist.whole_files import flush_to_disk

HERE = Path(__file__).parent
DECODER_SOURCES = (HERE / "decoder.cpp",)
SOURCES = tuple(sorted(set(HERE.glob("*.cpp")) - set(DECODER_SOURCES)))
_LIBRARY, _DIGEST = "operators.so", "operators.sha256"
_COMPILE_TIMEOUT_S = 600.0
_FAILED_FOR_S = 600.0
"""So long nobody tries again what a compiler could not do: processes ask one after the other."""

log = logging.getLogger(__name__)


@functools.cache
def load_operators() -> bool:
    """Make operators known as `torch.ops.moe_dist`, and the class of encoders.

    The first call on a machine compiles for half a minute and more, with `CXX` or `c++`. The
    library lies in the cache under what it was made of: source, flags, torch, C library and
    processor; a damaged one is built again. Where that fails it is False, and a warning.
    """
    if not _load("operators", SOURCES):
        return False
    count_flops()
    return True


@functools.cache
def load_decoder() -> bool:
    """Do the same for what decoders alone need, which is a third of all there is to compile."""
    return load_operators() and _load("decoder", DECODER_SOURCES)


def _load(name: str, sources: tuple[Path, ...]) -> bool:
    files = (*sources, *sorted(HERE.glob("*.h")), Path(__file__))
    digests = _short("".join(file_digest(path) for path in files))
    libc = "-".join(platform.libc_ver())
    made_of = f"{digests}-torch{torch.__version__}-{libc}-{_processor()}"
    compiler = os.environ.get("CXX") or "c++"
    place = default_cache_dir() / name / made_of
    compiling = functools.partial(
        _compile_unless_it_failed,
        shlex.split(compiler),
        sources,
        failure=place.with_name(f"{made_of}-{_short(compiler)}.failed"),
    )
    try:
        directory = build_once(place, compiling, is_good=_is_whole)
        torch.ops.load_library(directory / _LIBRARY)
    except (OSError, RuntimeError, subprocess.SubprocessError, MoeDistError) as error:
        log.warning(
            "no native operators here (%s): torch's are used, which take longer",
            _reason(error),
        )
        return False
    return True


def _compile_unless_it_failed(
    compiler: list[str], sources: tuple[Path, ...], directory: Path, *, failure: Path
) -> None:
    if shutil.which(compiler[0]) is None:
        raise ConversionError(
            f"there is no C++ compiler {compiler[0]!r}", remedy="install g++, or name one by CXX"
        )
    with suppress(OSError):
        if time.time() - failure.stat().st_mtime < _FAILED_FOR_S:
            raise ConversionError(
                f"a compiler failed lately: {failure.read_text(encoding='utf-8')}",
                remedy="mend it, and try again in ten minutes",
            )
    log.warning("compiling native operators, once for this machine; it takes half a minute or more")
    try:
        _compile(compiler, sources, directory)
    except (OSError, subprocess.SubprocessError) as error:
        with suppress(OSError):
            failure.write_text(_reason(error), encoding="utf-8")
        raise


def _compile(compiler: list[str], sources: tuple[Path, ...], directory: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    command = [
        *(*compiler, "-std=c++20", "-O3", "-march=native", "-fPIC", "-w"),
        *(["-fopenmp"] if sys.platform == "linux" else []),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-I{path}" for path in include_paths()),
    ]

    def compile_unit(unit: list[Path]) -> str:
        *before, last = map(str, unit)
        compiled = str(directory / unit[-1].with_suffix(".o").name)
        included = [part for path in before for part in ("-include", path)]
        _run([*command, *included, "-c", last, "-o", compiled])
        return compiled

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compile_unit, _units(sources, os.cpu_count() or 1)))
    library = directory / _LIBRARY
    linked = [*objects, *(f"-L{path}" for path in library_paths())]
    _run([*command, "-shared", *linked, "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)])
    for compiled in objects:
        Path(compiled).unlink()
    (directory / _DIGEST).write_text(file_digest(library), encoding="utf-8")
    for path in (library, directory / _DIGEST):
        flush_to_disk(path)


def _units(sources: tuple[Path, ...], number: int) -> list[list[Path]]:
    """Put sources together, so that at most as many compilers run, with about as much each.

    Most of what a compiler does is to read torch's headers.
    """
    units: list[list[Path]] = [[] for _ in range(min(number, len(sources)))]

    def size(path: Path) -> int:
        return path.stat().st_size

    for path in sorted(sources, key=size, reverse=True):
        min(units, key=lambda unit: sum(map(size, unit))).append(path)
    return units


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)


def _processor() -> str:
    """What a library that was compiled for this very processor needs to find again."""
    machine = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return machine
    kinds = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return f"{machine}-{_short(kinds[0])}" if kinds else machine


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_whole(directory: Path) -> bool:
    library, digest = directory / _LIBRARY, directory / _DIGEST
    if not (library.is_file() and digest.is_file()):
        return False
    return digest.read_text(encoding="utf-8") == file_digest(library)


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or ""
    if isinstance(said, bytes):
        said = said.decode(errors="replace")
    if not said.strip() and isinstance(error, subprocess.CalledProcessError):
        return f"the compiler failed with status {error.returncode} and said nothing"
    lines = (said.strip() or str(error)).splitlines() or [type(error).__name__]
    faults = [line for line in lines if "error" in line.lower()]
    return " ".join((faults or lines)[0].split())
