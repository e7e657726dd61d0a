"""Tables in Markdown."""

from __future__ import annotations

from pipelines.markdown import markdown_table


def test_a_cell_stays_one_cell() -> None:
    assert markdown_table(["key", "value"], [["a", "1"], ["b|c", ""]]) == [
        "| key | value |",
        "| --- | --- |",
        "| a | 1 |",
        "| b\\|c |  |",
    ]
