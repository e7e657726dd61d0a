"""Files and modules that documents and docstrings name are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASES = ("", "moe_dist", "pipelines", "docs", "tests", "pipelines/recipes")
FILE = re.compile(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|md|yaml))`")
MODULE = re.compile(r"`((?:moe_dist|pipelines|cluster)(?:\.[a-z]\w+)+)`")
# Results of a run, and files that readers bring themselves.
NOT_OURS = re.compile(r"outputs/|^(recipe|best|report|config)\.|^docs/reference/")


def sources(*suffixes: str) -> list[Path]:
    tops = ("moe_dist", "pipelines", "cluster", "docs", "tests")
    below = (path for top in tops for path in (ROOT / top).rglob("*"))
    return [path for path in (*ROOT.glob("*.md"), *below) if path.suffix in suffixes]


def exists(name: str, beside: Path) -> bool:
    places = [beside, *(ROOT / base for base in BASES)]
    return any((place / name).exists() for place in places) or (
        "/" not in name and any(ROOT.glob(f"*/**/{name}"))
    )


def test_files_that_are_named_exist() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(".md", ".py")
        for name in FILE.findall(path.read_text(encoding="utf-8"))
        if not NOT_OURS.search(name) and not exists(name, path.parent)
    }
    assert not missing


def test_modules_that_are_named_exist() -> None:
    def known(name: str) -> bool:
        parts = name.split(".")
        found = [ROOT.joinpath(*parts[:end]) for end in (len(parts), len(parts) - 1)]
        return any(path.with_suffix(".py").exists() or path.is_dir() for path in found)

    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(".md", ".py")
        for name in MODULE.findall(path.read_text(encoding="utf-8"))
        if not known(name)
    }
    assert not missing
