"""Documents hold no leavings of a search and replace, and their code blocks are whole."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
# Figures that stand where a part of a name stood: AWS_-0.2, 1/32ESS_KEY, NUM_3 %.
_BROKEN_NAME = re.compile(
    r"[A-Z0-9]_(?=[\u2212+\u00b1\u00d7%\u00f7]|-?\d+[.,]\d|\d+ ?%)"
    r"|(?<![\w./-])(?:\d+[.,/])+\d+[A-Z]+_|\d[A-Z]{2,}_[A-Z]"
)
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


def damages(text: str) -> Iterator[str]:
    """Name what is broken in a document, line by line."""
    fence = ""
    for number, line in enumerate(text.splitlines(), 1):
        if found := _BROKEN_NAME.search(line):
            yield f"{number}: a broken name near {line[max(0, found.start() - 20) : found.end()]!r}"
        if mark := _FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and not mark[2].strip():
                fence = ""
        if fence and line.lstrip().startswith("export "):
            words = shlex.split(line, comments=True)[1:]
            odd = [word for word in words if not _ASSIGNMENT.fullmatch(word)]
            if odd:
                yield f"{number}: export does not take {odd[0]!r}"
    if fence:
        yield "a code block has no end"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_document_is_whole(path: Path) -> None:
    assert list(damages(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "text",
    [
        "`AWS_\u22120.2, \u22121.4 to +0.8, at 1/8; +0.4, at 1/32ESS_KEY_ID=…`",
        "set NUM_3.5 first",
        "```\nexport KEY_A=1 0.3 % B=2\n```",
        "```\nexport A=1 +0.8, B=2\n```",
        "```sh\nmake\n",
        "~~~\n```\n",
    ],
)
def test_damage_is_found(text: str) -> None:
    assert list(damages(text))


def test_ordinary_text_is_no_damage() -> None:
    text = "`hidden_TD`, 2 GPUs, 1/32 of FFN_OUT, `E_4`\n```\nexport A=1 B='x y'   # C, D\n```\n"
    assert list(damages(text)) == []
