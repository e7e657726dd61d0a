"""The lines of Python on a model card, run as a reader would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BLOCK = """
import importlib.abc, json, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split():
            raise ImportError(name + " is not needed here")

sys.meta_path.insert(0, Blocked())
"""


def card_lines(directory: Path) -> str:
    """Take the first block of Python out of a directory's card."""
    card = (directory / "README.md").read_text()
    return card.partition("```python")[2].partition("```")[0]


def run_without(packages: Sequence[str], lines: str, result: str, directory: Path) -> Any:
    """Run lines in a directory, in another process that cannot import some packages.

    Returns what the expression `result` is after them; it must be JSON's.
    """
    program = f"{_BLOCK}{lines}\nprint(json.dumps({result}))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, " ".join(packages)],
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
