from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data.sources import load_splits, resolve_model
from moe_dist.errors import DataError
from tests.data.tsv_rows import ROWS, Rows, load


def test_label_names_are_inferred_in_sorted_order(tmp_path: Path) -> None:
    splits = load(tmp_path)
    assert splits.task.label_names == ("neg", "pos")
    assert splits.train["label"][:] == [1, 0, 1]
    assert splits.train[1] == {"text_a": "a bad plot", "text_b": None, "label": 0, "sample_id": 1}
    assert splits.task.metrics == ("accuracy",)
    assert splits.task.num_labels == 2


def test_inferred_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [(f"text {i}", str(i)) for i in (10, 9, 2)]
    assert load(tmp_path, rows).task.label_names == ("2", "9", "10")


def test_labels_may_be_names_or_ids(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "neg"), ("c", "0"), ("d", "pos")]
    splits = load(tmp_path, rows, label_names=["neg", "pos"])
    assert splits.train["label"][:] == [1, 0, 0, 1]


def test_pairs_and_regression(tmp_path: Path) -> None:
    rows = [("x", "y", "0.5"), ("u", "v", "4")]
    splits = load(
        tmp_path,
        rows,
        header=("s1", "s2", "score"),
        text_columns=["s1", "s2"],
        label_column="score",
        kind="regression",
    )
    assert splits.train[0] == {"text_a": "x", "text_b": "y", "label": 0.5, "sample_id": 0}
    assert splits.task.metrics == ("pearson", "spearman")
    assert splits.task.num_labels == 1


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([("x", "a"), ("y", "b")], {"text_columns": ["words"]}, r"line 2: there is no column 'wo"),
        ([("x", "a"), ("y", "b")], {"label_column": "y"}, r"line 2: there is no column 'y'"),
        ([("x", "a"), ("y", "c")], {"label_names": ["a", "b"]}, r"line 3: label 'c' is not in"),
        ([("x", "0"), ("y", "2")], {"label_names": ["a", "b"]}, r"line 3: label '2' is not in"),
        ([("x", "1"), ("y", "nan")], {"kind": "regression"}, r"line 3: label 'nan' is not a fin"),
        ([("x", "1"), ("y", "")], {"kind": "regression"}, r"line 3: label '' is not a finite"),
        ([("x", "a"), ("y", "a")], {}, "holds 1 different labels"),
        ([(str(i), str(i)) for i in range(1001)], {}, "kind=regression"),
        (ROWS, {"dev_rows": [("x", "other")]}, r"dev.tsv, line 2: label 'other'"),
        (
            [(f"{stars} stars", str(stars)) for stars in (1, 2, 4, 5)],
            {"dev_rows": [("x", "3")]},
            r"dev.tsv, line 2: label '3' is not in the list '1', '2', '4', '5'",
        ),
        (
            [("x", "-1"), ("y", "1")],
            {"dev_rows": [("x", "0")]},
            r"dev.tsv, line 2: label '0' is not in",
        ),
        (
            [("x", "0.5"), ("y", "1.5")],
            {"dev_rows": [("x", "1")]},
            r"dev.tsv, line 2: label '1' is not in",
        ),
        ([("x", "7"), ("y", "2")], {"label_names": ["none", "7", "x"]}, r"line 3: label '2' is"),
        (ROWS, {"text_columns": []}, "one or two columns"),
        (ROWS, {"text_columns": ["a", "b", "c"]}, "one or two columns"),
        (ROWS, {"metrics": ["bleu"]}, "unknown bleu"),
        (ROWS, {"label_names": ["pos", "pos"]}, "distinct classes"),
        (
            ROWS,
            {"label_names": ["pos", "neg"], "kind": "regression"},
            "names classes, and data.kind=regression",
        ),
        (ROWS, {"dev": None}, "no dev set"),
        (ROWS, {"dev_size": 1}, "both given"),
        (ROWS, {"train": None}, "data.train is not given"),
        (ROWS, {"source": "ftp"}, "use hub, files or package"),
        (ROWS, {"source": "hub"}, "data.name is not given"),
        (ROWS, {"source": "package", "name": "nothing"}, "no data package"),
    ],
)
def test_faults_are_named(
    tmp_path: Path, rows: Rows, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path, rows, **changes)
    assert caught.value.remedy


def test_text_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": 0}\n{"text": null, "label": 1}\n')
    with pytest.raises(DataError, match="line 2: column 'text' holds no text"):
        load_splits(source="files", train=path, dev=path, text_columns=["text"])


@pytest.mark.parametrize("missing", ["null", "NaN", '""', '" "'])
@pytest.mark.parametrize("label_names", [None, ["a", "b"], ["None", "nan", ""]])
def test_missing_labels_are_refused(
    tmp_path: Path, missing: str, label_names: list[str] | None
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "x", "label": 0}}\n{{"text": "y", "label": {missing}}}\n')
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the label is missing") as caught:
        load_splits(
            source="files", train=path, dev=path, text_columns=["text"], label_names=label_names
        )
    assert caught.value.remedy == "fill it in or drop the line"


def test_missing_label_of_a_dev_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dev.tsv, line 3: the label is missing"):
        load(tmp_path, dev_rows=[("x", "pos"), ("y", "")])


def test_dev_is_held_out_and_disjoint(tmp_path: Path) -> None:
    rows = [(f"sentence number {i} about subject {i * 7} only", str(i % 2)) for i in range(100)]
    rows.append(rows[0])
    first = load(tmp_path, rows, dev=None, dev_size=0.2, seed=3)
    again = load(tmp_path, rows, dev=None, dev_size=0.2, seed=3)
    other = load(tmp_path, rows, dev=None, dev_size=0.2, seed=4)
    assert len(first.dev) == 20
    assert not set(first.train["text_a"][:]) & set(first.dev["text_a"][:])
    assert first.digest == again.digest != other.digest
    assert len(first.train) + len(first.dev) + first.num_near_copies == 101


def test_limits_draw_by_seed(tmp_path: Path) -> None:
    rows = [(f"t{i}", str(i % 2)) for i in range(50)]
    splits = load(tmp_path, rows, max_train_samples=10, max_dev_samples=5)
    assert (len(splits.train), len(splits.dev)) == (10, 5)
    assert splits.train["sample_id"][:] != list(range(10))
    again = load(tmp_path, rows, max_train_samples=10, max_dev_samples=5)
    assert again.train["sample_id"][:] == splits.train["sample_id"][:]


def test_a_holdout_leaves_the_dev_rows_and_comes_before_the_limit(tmp_path: Path) -> None:
    rows = [(f"sentence number {i} of {i * i}", str(i % 2)) for i in range(60)]
    rows += [(f"number {i} of", str(i % 2)) for i in range(60)]
    whole = load(tmp_path, rows, dev=None, dev_size=20)
    assert whole.holdout is None and whole.num_overlapping == 0
    splits = load(tmp_path, rows, dev=None, dev_size=20, holdout_samples=10)
    assert splits.holdout is not None and len(splits.holdout) == 10
    assert splits.dev[:] == whole.dev[:]
    assert len(splits.train) + 10 + splits.num_overlapping == len(whole.train)
    less = load(tmp_path, rows, dev=None, dev_size=20, holdout_samples=10, max_train_samples=5)
    assert less.holdout is not None and less.holdout[:] == splits.holdout[:]
    assert len(less.train) == 5
    held = set(splits.holdout["sample_id"][:])
    assert not held & set(splits.train["sample_id"][:]) and not held & set(
        less.train["sample_id"][:]
    )
    assert len({whole.digest, splits.digest, less.digest}) == 3
    assert whole.train_digest != splits.train_digest


def test_digest_follows_the_content(tmp_path: Path) -> None:
    changed = [*ROWS[:2], ("fine acting there", "pos")]
    assert load(tmp_path).digest == load(tmp_path).digest
    assert load(tmp_path).digest != load(tmp_path, changed, dev_rows=ROWS).digest


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"dev_rows": ROWS[:2]}, True),
        ({"metrics": ["f1"]}, True),
        ({"max_dev_samples": 1}, True),
        ({"rows": [*ROWS[:2], ("fine acting there", "pos")]}, False),
        ({"max_train_samples": 2}, False),
        ({"label_names": ["pos", "neg"]}, False),
        ({"label_names": ["neg", "pos", "none"]}, False),
    ],
)
def test_train_digest_follows_what_training_sees(
    tmp_path: Path, changes: dict[str, Any], same: bool
) -> None:
    first = load(tmp_path)
    other = load(tmp_path, **({"dev_rows": ROWS} | changes))
    assert (first.train_digest == other.train_digest) is same
    assert (first.digest == other.digest) is not bool(changes)
    assert other.digest != other.train_digest


@pytest.mark.parametrize(
    ("folder", "name", "changes", "sizes"),
    [
        (
            "CoLA",
            "cola",
            {"column_names": ["source", "label", "note", "sentence"]},
            (8551, 1043),
        ),
        ("SST-2", "sst2", {}, (67349, 872)),
        ("RTE", "rte", {}, (2490, 277)),
        (
            "MRPC",
            "mrpc",
            {"text_columns": ["#1 String", "#2 String"], "label_column": "Quality"},
            (3668, 408),
        ),
        ("STS-B", "stsb", {"label_column": "score"}, (5749, 1500)),
    ],
)
def test_glue_files(
    shared_data: Path, folder: str, name: str, changes: dict[str, Any], sizes: tuple[int, int]
) -> None:
    glue = shared_data / "glue" / folder
    splits = load_splits(
        source="files", name=name, train=glue / "train.tsv", dev=glue / "dev.tsv", **changes
    )
    assert (len(splits.train), len(splits.dev)) == sizes
    if name == "stsb":
        assert 0.0 <= min(splits.train["label"][:]) < max(splits.train["label"][:]) <= 5.0
    else:
        assert set(splits.dev["label"][:]) == {0, 1}


def test_hub_data_set_with_declared_classes(tmp_path: Path) -> None:
    # A folder stands for a repository: `load_dataset` reads both alike.
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"premise": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for split, labels in (("train", [1, 0, 1]), ("validation", [0])):
        rows = {"premise": [f"{split} {i}" for i in range(len(labels))], "label": labels}
        Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    splits = load_splits(source="hub", name=str(tmp_path), text_columns=["premise"])
    assert splits.task.label_names == ("no", "yes")
    assert splits.train["label"][:] == [1, 0, 1]
    assert splits.dev["text_a"][:] == ["validation 0"]
    with pytest.raises(DataError, match="there is no column 'text'"):
        load_splits(source="hub", name=str(tmp_path), text_columns=["text"])
    with pytest.raises(DataError, match=r"split 'dev'.*splits 'train', 'validation'") as caught:
        load_splits(source="hub", name=str(tmp_path), text_columns=["premise"], dev="dev")
    assert "data.dev_size" in caught.value.remedy


def test_hub_ids_stay_ids_where_names_are_numbers(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    names = ["1", "2", "4", "5"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    for split in ("train", "validation"):
        rows = {"text": [f"{split} {name}" for name in names], "label": [0, 1, 2, 3]}
        Dataset.from_dict(rows, features=features).to_parquet(
            tmp_path / f"{split}-00000-of-00001.parquet"
        )
    splits = load_splits(source="hub", name=str(tmp_path), text_columns=["text"])
    assert splits.task.label_names == tuple(names)
    assert splits.train["label"][:] == splits.dev["label"][:] == [0, 1, 2, 3]


def test_hub_without_network_fails_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    # A port where nobody listens stands for a machine without network.
    for home, name, value in (
        (huggingface_hub.constants, "HF_HUB_OFFLINE", False),
        (huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9"),
        (datasets.config, "HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(home, name, value)
    with pytest.raises(DataError, match="hub cannot be used") as caught:
        load_splits(source="hub", name="moe-dist/no-such-set", subset="rte")
    assert "data.source=files" in caught.value.remedy
    assert datasets.config.HF_HUB_OFFLINE is False


def test_model_names_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./absent", "no such model directory"),
        ("file:///absent", "no such model directory"),
        ("a/b/c", "no such model directory"),
        ("package:absent", "no model package"),
        ("moe-dist/absent", "hub cannot be used"),
    ],
)
def test_model_that_is_not_to_be_had(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        resolve_model(name)
    assert caught.value.remedy


def test_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        resolve_model(str(tmp_path))


def test_of_several_texts_in_a_label_the_first_is_the_target(tmp_path: Path) -> None:
    rows = [
        {"text": f"a question {number}", "answers": {"text": texts, "answer_start": [0] * 9}}
        for number, texts in enumerate([["one", "1"], ["two"], ["three", "3", "III"]])
    ]
    plain = [{"text": f"another {number}", "answers": f"plain {number}"} for number in range(3)]
    train, dev = tmp_path / "train.jsonl", tmp_path / "dev.jsonl"
    train.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    dev.write_text("".join(f"{json.dumps(row)}\n" for row in plain))
    splits = load_splits(
        source="files",
        train=train,
        dev=dev,
        kind="seq2seq",
        text_columns=["text"],
        label_column="answers",
    )
    assert splits.train["label"] == ["one", "two", "three"]
    assert splits.dev["label"] == ["plain 0", "plain 1", "plain 2"]
    (note,) = splits.summary.notes
    assert note.startswith("2 rows have several texts in 'answers': the first")
    train.write_text(json.dumps({"text": "a", "answers": {"text": []}}))
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: column 'answers' holds no text"):
        load_splits(
            source="files",
            train=train,
            dev=dev,
            kind="seq2seq",
            text_columns=["text"],
            label_column="answers",
        )


@pytest.mark.parametrize("has_modules", [True, False])
def test_a_sentence_model_of_the_hub_comes_with_its_pooling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_modules: bool
) -> None:
    import huggingface_hub

    (tmp_path / "model.safetensors").touch()
    if has_modules:
        (tmp_path / "modules.json").touch()
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("some/encoder") == str(tmp_path)
    assert asked[1:] == [["*_Pooling/config.json"]] * has_modules
