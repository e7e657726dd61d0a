"""Text files become documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.documents import Documents, read_documents
from moe_dist.data.sources import load_splits
from moe_dist.errors import DataError

WIKI = [
    "",
    " = First = ",
    "",
    " Some text . ",
    "",
    " = = Part = = ",
    " More text . ",
    "",
    " = Second = ",
    " Other text . ",
]


def cut(lines: list[str], how: Documents | None) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    return list(read_documents(Path("x.txt"), lines, how, said.append)), said


def test_headings_of_the_top_level_begin_documents_and_this_is_said() -> None:
    found, said = cut(WIKI, None)
    assert [line for line, _ in found] == [2, 9]
    assert found[0][1]["text"].endswith(" = = Part = = \n More text . ")
    assert found[1][1]["text"] == " = Second = \n Other text . "
    assert said == [
        "x.txt: a document begins at each heading like '= First =' (data.documents=headings)"
    ]
    assert cut(WIKI, "headings") == (found, [])


def test_what_stands_before_the_first_heading_is_a_document() -> None:
    assert [line for line, _ in cut(["a", " = B = ", "c"], "headings")[0]] == [1, 2]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (None, [(1, "a\nb\n\n \nc")]),
        ("file", [(1, "a\nb\n\n \nc")]),
        ("lines", [(1, "a"), (2, "b"), (5, "c")]),
        ("paragraphs", [(1, "a\nb"), (5, "c")]),
    ],
)
def test_other_text_is_cut_as_the_recipe_says(
    how: Documents | None, expected: list[tuple[int, str]]
) -> None:
    found, said = cut(["a", "b", "", " ", "c", ""], how)
    assert [(line, row["text"]) for line, row in found] == expected
    assert said == (
        ["x.txt: the whole file is one document (data.documents=file)"] if how is None else []
    )


def test_a_language_model_reads_text_files_and_a_classifier_reads_tables(tmp_path: Path) -> None:
    (tmp_path / "wiki.train.tokens").write_text("\n".join(WIKI))
    (tmp_path / "dev.txt").write_text("text\tlabel\nno table\there\n")
    splits = load_splits(
        source="files",
        kind="causal_lm",
        train=tmp_path / "wiki.train.tokens",
        dev=tmp_path / "dev.txt",
    )
    assert len(splits.train) == 2
    assert splits.dev["text_a"] == ["text\tlabel\nno table\there"]
    with pytest.raises(DataError, match="unknown kind of data file"):
        load_splits(source="files", train=tmp_path / "wiki.train.tokens", dev_size=1)


def test_a_directory_of_texts_is_a_document_each(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "texts" / f"{name}.txt").write_text(f"the text {name}\n")
    splits = load_splits(
        source="files",
        kind="causal_lm",
        train=tmp_path / "texts",
        dev_size=1,
        documents="file",
    )
    assert len(splits.train) + len(splits.dev) == 3


def test_blank_lines_after_a_document_are_none_of_it() -> None:
    found, _ = cut([" = A = ", " one ", " ", "", " = B = ", " two ", " "], "headings")
    assert [row["text"] for _, row in found] == [" = A = \n one ", " = B = \n two "]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_table_has_a_document_in_each_row(tmp_path: Path, name: str) -> None:
    import pandas as pd

    table = pd.DataFrame({"text": ["one text", "other text"]})
    if name.endswith("jsonl"):
        table.to_json(tmp_path / name, orient="records", lines=True)
    else:
        table.to_parquet(tmp_path / name)
    given: dict[str, Any] = {"source": "files", "kind": "causal_lm", "dev_size": 1}
    with pytest.raises(DataError, match="each row of a table is one"):
        load_splits(train=tmp_path / name, documents="lines", **given)
    assert len(load_splits(train=tmp_path / name, **given).train) == 1


def test_a_table_needs_one_text_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("body,title\none text,a\nother text,b\n")
    given: dict[str, Any] = {"source": "files", "kind": "causal_lm", "dev_size": 1}
    splits = load_splits(train=tmp_path / "rows.csv", text_columns=["body"], **given)
    assert len(splits.train) == 1
    with pytest.raises(DataError, match="no column 'text'"):
        load_splits(train=tmp_path / "rows.csv", **given)
    with pytest.raises(DataError, match="one column of running text"):
        load_splits(train=tmp_path / "rows.csv", text_columns=["body", "title"], **given)


def test_rows_of_the_hub_that_are_lines_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dist.data import reading

    def read(name: str, subset: Any, split: str, columns: Any, revision: Any) -> Any:
        return [(number, {"text": f"{line}\n"}) for number, line in enumerate(WIKI, start=1)], None

    monkeypatch.setattr(reading, "read_hub", read)
    given: dict[str, Any] = {"source": "hub", "kind": "causal_lm", "name": "a/wiki"}
    splits = load_splits(documents="headings", **given)
    assert [text.split("\n")[0] for text in splits.train["text_a"]] == [
        " = First = ",
        " = Second = ",
    ]
    with pytest.raises(DataError, match="no column 'body'"):
        load_splits(documents="headings", text_columns=["body"], **given)
    assert len(load_splits(**given).train) == len(WIKI)
