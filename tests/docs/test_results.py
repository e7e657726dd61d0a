"""What `docs/results` may claim: ratios follow from their own rows, and tables name a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.tables import Table, claimed_ratio, name_of, number_in, read_tables

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
DOCUMENTS = sorted(RESULTS.glob("*.md"))
# A heading of a ratio says of what: `[NAME:] A ÷ B [(remark)]`.
RATIO_WORDS = re.compile(r"÷|\bratio|\bretention|\bspeed-?up|\bshare\b|\bquotient|×\s*\w", re.I)
COMMAND = re.compile(r"^(moe-dist|make|python|for|time) ", re.M)
NO_COMMAND = re.compile(r"\bcommands?\b[^.|]*\b(was|were) not kept", re.I)


def formula_of(column: str) -> str:
    return re.sub(r"\s*\((goal|published)[^)]*\)$", "", column).rpartition(": ")[2]


def faults_of(table: Table) -> list[str]:
    """Everything that a table says of a ratio and that its rows do not."""
    faults = []
    for place, column in enumerate(table.columns):
        if not RATIO_WORDS.search(column):
            continue
        if "÷" not in column:
            faults.append(f"{column!r} does not say what is divided by what")
            continue
        for row in table.rows:
            printed = number_in(row[place])
            if printed is None:
                continue
            try:
                low, high = claimed_ratio(table, row, formula_of(column))
            except ValueError as error:
                faults.append(f"{column!r}, {name_of(row[0])!r}: {error}")
                continue
            if printed[1] < low or printed[0] > high:
                faults.append(
                    f"{column!r}, {name_of(row[0])!r}: {row[place]} is not {low:.4g} to {high:.4g}"
                )
    return faults


def has_command(section: str) -> bool:
    """Whether a section shows a command in code, or says that there is none."""
    code = re.findall(r"^```\n(.*?)^```", section, re.M | re.S)
    prose = re.sub(r"^```\n.*?^```", "", section, flags=re.M | re.S)
    code += re.findall(r"`([^`]+)`", prose)
    flowing = " ".join(prose.split())
    return any(COMMAND.search(one) for one in code) or bool(NO_COMMAND.search(flowing))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_ratio_follows_from_its_row(path: Path) -> None:
    found = {f"{path.name}:{t.line}": faults_of(t) for t in read_tables(path)}
    assert not {place: faults for place, faults in found.items() if faults}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_table_has_a_command_or_says_that_there_is_none(path: Path) -> None:
    tables = list(read_tables(path))
    assert tables
    assert not [f"{path.name}:{t.line}" for t in tables if not has_command(t.section)]


@pytest.mark.parametrize(
    ("column", "cell", "fault"),
    [
        ("ours ÷ floor (goal 1.15)", "1.26", None),
        ("slowing: ours ÷ floor", "1.123", "is not 1.2"),
        ("ours ÷ (2 × floor + floor)", "0.42", None),
        ("ours ÷ first's", "1.25", None),
        ("ours ÷ first's", "1.32", "is not 1.24"),
        ("share: (ours + floor) ÷ (1000 × floor)", "0.23 %", None),
        ("share: (ours + floor) ÷ (1000 × floor)", "0.23", "is not 0.002"),
        ("× floor", "1.26", "does not say"),
        ("retention", "1.26", "does not say"),
        ("ours ÷ theirs", "1.26", "no column 'theirs'"),
        ("ours ÷ second's", "1.26", "0 rows are called 'second'"),
        ("ours ÷ floor", "", None),
    ],
)
def test_a_wrong_ratio_is_found(tmp_path: Path, column: str, cell: str, fault: str | None) -> None:
    path = tmp_path / "document.md"
    path.write_text(
        f"# Title\n\n| load | ours, ms | floor, ms | {column} |\n|---|---|---|---|\n"
        f"| first | 275.2 | 230 | |\n| **4 ×** | 344 ± 2 | 273 | {cell} |\n"
    )
    (table,) = read_tables(path)
    faults = faults_of(table)
    assert len(faults) == (fault is not None)
    assert all(fault in one for one in faults if fault)


def test_a_number_of_a_row_that_is_missing_is_found(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text("# Title\n| run | a | b | a ÷ b |\n|---|---|---|---|\n| median | | | 0.78 |\n")
    (table,) = read_tables(path)
    assert "has no number" in faults_of(table)[0]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("```\nmoe-dist benchmark layer\n```", True),
        ("from `moe-dist seeds outputs/a` as above", True),
        ("The commands of this table were not kept.", True),
        ("The command\nwas not kept.", True),
        ("`moe.partition` was kept, and one table is of its own measuring function", False),
        ("The recipe took `train.learning_rate: 2e-4`.", False),
        ("", False),
    ],
)
def test_a_table_without_a_command_is_found(tmp_path: Path, text: str, known: bool) -> None:
    rows = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    path = tmp_path / "document.md"
    path.write_text(f"# One\n`make test`\n{rows}\n## Two\n{text}\n\n{rows}")
    assert [has_command(table.section) for table in read_tables(path)] == [True, known]
