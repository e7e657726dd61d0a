"""The page on adding a family, followed by the letter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def add_before(path: Path, mark: str, block: str) -> None:
    """Put a block of the page, and a comma, one level in before the one place of `mark`."""
    text = path.read_text(encoding="utf-8")
    assert text.count(mark) == 1, path
    path.write_text(
        text.replace(mark, f"\n{textwrap.indent(block, '    ').rstrip()},{mark}"), encoding="utf-8"
    )


def test_a_family_added_as_the_page_says_passes_what_every_family_passes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    (_, row), (_, sizes), (_, command) = BLOCK.findall(page)
    for name in ("moe_dist", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    add_before(tmp_path / "moe_dist" / "conversion" / "family_rows.py", "\n)\n\nFAMILIES:", row)
    add_before(tmp_path / "tests" / "conversion" / "dense_models.py", "\n}\n_VARIANTS:", sizes)
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "-q"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 40, done.stdout[-300:]


def test_the_table_names_every_family() -> None:
    from moe_dist.conversion.families import FAMILIES

    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.split("## Adding")[0].lower().replace("-", "")
    for name in FAMILIES:
        assert {"xlmroberta": "xlmr"}.get(name.replace("-", ""), name.replace("-", "")) in table
