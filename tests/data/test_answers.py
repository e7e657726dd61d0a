"""Answers that are parts of a context: SQuAD's files, columns, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.sources import Splits, load_splits
from moe_dist.errors import DataError

CONTEXT = "Zoë was born in Köln in 1901, they say. She left Köln in 1920 🙂 for Rome."


def question(text: str, start: int | None = None, **changes: Any) -> dict[str, Any]:
    """A question whose answer is a part of CONTEXT."""
    place = CONTEXT.find(text) if start is None else start
    row = {
        "id": "q1",
        "question": "Where?",
        "context": CONTEXT,
        "answers": {"text": [text], "answer_start": [place]},
    }
    return row | changes


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def write_squad(path: Path, articles: dict[str, dict[str, list[Any]]], **dump: Any) -> Path:
    """Articles by title, with their contexts, and these with their `qas`."""
    data = [
        {
            "title": title,
            "paragraphs": [{"context": text, "qas": qas} for text, qas in contexts.items()],
        }
        for title, contexts in articles.items()
    ]
    path.write_text(json.dumps({"version": "v2.0", "data": data}, **dump), encoding="utf-8")
    return path


def qa(name: str, text: str, *answers: str, context: str = CONTEXT, **more: Any) -> dict[str, Any]:
    found = [{"text": one, "answer_start": context.index(one)} for one in answers]
    return {"id": name, "question": text, "answers": found, **more}


def load(train: Path, dev: Path | None = None, **changes: Any) -> Splits:
    arguments: dict[str, Any] = {"source": "files", "kind": "question_answering", "train": train}
    return load_splits(**(arguments | ({"dev": dev} if dev else {}) | changes))


def test_squads_files_and_columns_give_the_same_rows(tmp_path: Path) -> None:
    qas = [
        qa("a", "Where?", "Köln", "in Köln"),
        qa("b", "Who cares?", is_impossible=True, plausible_answers=[{"text": "x"}]),
    ]
    flat = [
        {
            "id": one["id"],
            "question": one["question"],
            "context": CONTEXT,
            "answers": {
                "text": [answer["text"] for answer in one["answers"]],
                "answer_start": [answer["answer_start"] for answer in one["answers"]],
            },
        }
        for one in qas
    ]
    places = [
        write_squad(tmp_path / "one.json", {"A": {CONTEXT: qas}}),
        write_squad(tmp_path / "lines.json", {"A": {CONTEXT: qas}}, indent=1),
        write_rows(tmp_path / "rows.jsonl", *flat),
        write_rows(
            tmp_path / "texts.jsonl",
            *[row | {"answers": json.dumps(row["answers"])} for row in flat],
        ),
    ]
    for place in places:
        splits = load(place, place)
        assert splits.train["text_a"][:] == ["Where?", "Who cares?"], place
        assert splits.train["text_b"][:] == [CONTEXT, CONTEXT]
        assert list(map(json.loads, splits.train["label"])) == [qas[0]["answers"], []]
        assert splits.task.metrics == ("answer_f1", "exact_match")
        assert "50.0% of questions have an answer (50.0% of dev)" in splits.summary.figures


@pytest.mark.parametrize(
    ("row", "message", "remedy"),
    [
        (question("Berlin", 3), "the answer 'Berlin' is not in its context", "kind=seq2seq"),
        (question("Zoë", 1), "does not start at character 1 but at 0: .* off by one", "from 0"),
        (question("Köln", 15), "does not start at character 15 but at 16: .* off by one", "as it"),
        (question("Köln", 51), "but after 51 bytes: starts look as if counted in bytes", "is 49"),
        (question("Rome", 69), "after 69 units of UTF-16", "here it is 68"),
        (question("Köln", 33), "the nearest place where it stands is 49", "blanks"),
        (question("Köln", -54), "the nearest place where it stands is 16", "blanks"),
        (question("", 0), "an answer is empty", "empty list"),
        (question("Köln", question=" \n"), "the question is empty", "drop"),
        (question("Köln", context=" "), "the context is empty", "drop"),
        (question("Köln", answers="Köln"), "holds no answers: 'Köln'", "write JSON"),
        (question("Köln", answers="{'text': ['Köln']}"), "holds no answers", "write JSON"),
        (question("Köln", answers={"text": ["Köln"]}), "holds no answers", '"answer_start"'),
        (
            question("Köln", answers={"text": ["a", "b"], "answer_start": [1]}),
            "holds no answers",
            "answer_start",
        ),
        (
            question("Köln", answers={"text": ["Köln"], "answer_start": ["16"]}),
            "no text with a whole number: 'Köln' at '16'",
            "answer_start",
        ),
        (question("Köln", answers=7), "holds no answers: '7'", "empty lists"),
    ],
)
def test_what_is_wrong_is_one_error_with_file_and_question(
    row: dict[str, Any], message: str, remedy: str, tmp_path: Path
) -> None:
    place = write_rows(tmp_path / "train.jsonl", question("Rome", id="q0"), row)
    with pytest.raises(DataError, match=message) as caught:
        load(place, place)
    assert caught.value.message.startswith(f"{place}, line 2: question q1: ")
    assert remedy in (caught.value.remedy or "")


def test_an_id_stands_once(tmp_path: Path) -> None:
    place = write_rows(tmp_path / "a.jsonl", question("Rome"), question("Köln"))
    with pytest.raises(DataError, match="line 2: question q1: the same id stands at line 1 too"):
        load(place, place)
    # Without ids nothing can repeat, and dev rows may have those of training rows.
    rows = [question("Rome"), question("Köln")]
    for row in rows:
        del row["id"]
    place = write_rows(tmp_path / "b.jsonl", *rows)
    assert len(load(place, place).train) == 2


def test_faults_of_squads_files_name_article_or_question(tmp_path: Path) -> None:
    place = tmp_path / "squad.json"
    write_squad(place, {"A": {CONTEXT: [qa("a", "Where?", "Köln", is_impossible=True)]}})
    with pytest.raises(DataError, match=r"squad.json, question a: it is marked as impossible and"):
        load(place, place)
    write_squad(place, {"A": {CONTEXT: [{"id": "a", "question": "Where?"}]}})
    with pytest.raises(DataError, match=r"question a: column 'answers' is missing"):
        load(place, place)
    place.write_text(json.dumps({"data": [{"paragraphs": [{"qas": []}]}]}))
    with pytest.raises(DataError, match=r"article 1, paragraph 1: context is missing"):
        load(place, place)
    place.write_text(json.dumps({"data": [{"paragraphs": []}]}))
    with pytest.raises(DataError, match="holds no rows"):
        load(place, place)


def test_dev_rows_are_whole_contexts(tmp_path: Path) -> None:
    names = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    articles: dict[str, dict[str, list[Any]]] = {
        name: {
            f"{name} {' '.join(f'{name}{i}' for i in range(9))}": [
                {"id": f"{name}{i}", "question": f"{name} or {i}?", "answers": []} for i in range(5)
            ]
        }
        for name in names
    }
    # Nearly the same context under another title.
    copy = next(iter(articles["alpha"])) + " indeed"
    articles["copy"] = {
        copy: [
            {
                "id": "copy",
                "question": "what?",
                "answers": [{"text": "indeed", "answer_start": copy.index("indeed")}],
            }
        ]
    }
    place = write_squad(tmp_path / "squad.json", articles)
    for seed in range(8):
        splits = load(place, dev_size=7, seed=seed, holdout_samples=6)
        parts = [set(part["text_b"]) for part in (splits.train, splits.dev, splits.holdout)]
        assert 7 <= len(splits.dev) <= 12 and 6 <= len(splits.holdout) <= 12
        for index, one in enumerate(parts):
            for other in parts[index + 1 :]:
                assert one.isdisjoint(other)
                near = {next(iter(articles["alpha"])), copy}
                assert not (one & near and other & near)
        said = f"the dev rows are all questions of {len(parts[1])} contexts, held out"
        assert said in splits.summary.notes
    with pytest.raises(DataError, match=r"data.dev_size=40 takes all 9 contexts"):
        load(place, dev_size=40)


def test_a_dev_set_with_unanswerable_questions_alone_is_warned_of(tmp_path: Path) -> None:
    train = write_squad(tmp_path / "train.json", {"A": {CONTEXT: [qa("a", "Where?", "Köln")]}})
    dev = write_squad(tmp_path / "dev.json", {"A": {CONTEXT: [qa("b", "Why?"), qa("c", "Who?")]}})
    warnings = load(train, dev).summary.warnings
    assert any("2 of 2 dev questions have no answer and all" in line for line in warnings)
    assert not any("no answer and all" in line for line in load(train, train).summary.warnings)


def test_options_of_questions_are_no_one_elses(tmp_path: Path) -> None:
    place = write_squad(tmp_path / "a.json", {"A": {CONTEXT: [qa("a", "Where?", "Köln")]}})
    splits = load(place, place, stride=7, max_answer_length=None)
    assert splits.task.options == {"stride": 7}
    assert splits.train_digest != load(place, place, stride=8).train_digest
    measured_otherwise = load(place, place, stride=7, max_answer_length=3)
    assert splits.train_digest == measured_otherwise.train_digest
    assert splits.digest != measured_otherwise.digest
    with pytest.raises(DataError, match=r"data.stride is not read by data.kind=regression"):
        load(place, place, kind="regression", stride=7)


def test_the_hubs_layout_is_read_with_ids(tmp_path: Path) -> None:
    from datasets import Dataset, Features, List, Value

    features = Features(
        {
            "id": Value("string"),
            "title": Value("string"),
            "context": Value("string"),
            "question": Value("string"),
            "answers": {"text": List(Value("string")), "answer_start": List(Value("int32"))},
        }
    )
    rows = [question("Rome", id="q0", title="A"), question("", id="q1", title="A")]
    rows[1]["answers"] = {"text": [], "answer_start": []}
    folder = tmp_path / "squad"
    folder.mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    splits = load_splits(source="hub", name=str(folder), kind="question_answering")
    assert [len(json.loads(label)) for label in splits.dev["label"]] == [1, 0]
    rows[0]["answers"]["answer_start"] = [3]
    Dataset.from_list(rows, features=features).to_parquet(folder / "train.parquet")
    with pytest.raises(DataError, match="line 1: question q0: the answer 'Rome' does not start"):
        load_splits(source="hub", name=str(folder), kind="question_answering")


def test_unlabelled_questions_need_no_answers(tmp_path: Path) -> None:
    train = write_squad(tmp_path / "train.json", {"A": {CONTEXT: [qa("a", "Where?", "Köln")]}})
    more = write_squad(
        tmp_path / "more.json",
        {"B": {"Rome is old and large.": [{"id": "b", "question": "How old is Rome?"}]}},
    )
    dev = write_squad(
        tmp_path / "dev.json", {"C": {"Paris lies there.": [qa("c", "Where?", context="")]}}
    )
    splits = load(train, dev, unlabelled=[str(more)])
    assert splits.unlabelled is not None
    assert splits.unlabelled["label"][:] == ["[]"]
    assert len(splits.distilled) == 2
