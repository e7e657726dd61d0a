from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moe_dist.data import encoding
from moe_dist.data.loaders import (
    Encoded,
    TrainBatches,
    bounded_batch,
    collate,
    encode,
    eval_batches,
)
from moe_dist.errors import DataError
from moe_dist.tasks.classification import Classification
from moe_dist.tasks.kind import IGNORED, TokenRows

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def dataset(num: int = 23, *, pair: bool = False, regression: bool = False) -> Dataset:
    return Dataset.from_dict(
        {
            "text_a": [" ".join(WORDS[: 1 + i % 7]) for i in range(num)],
            "text_b": ["w1 w2" if pair else None for _ in range(num)],
            "label": [i / 2 if regression else i % 2 for i in range(num)],
            "sample_id": [100 + i for i in range(num)],
        }
    )


def synthetic(num: int, seed: int = 0, longest: int = 29) -> Encoded:
    lengths = np.random.default_rng(seed).integers(1, longest + 1, num)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    return Encoded(
        input_ids=np.arange(1, offsets[-1] + 1, dtype=np.int32),
        token_type_ids=None,
        offsets=offsets,
        labels=np.arange(num, dtype=np.int64),
        sample_ids=np.arange(num, dtype=np.int64),
    )


def test_encoding_equals_the_tokenizer(tokenizer: Any, tmp_path: Path) -> None:
    rows = dataset(pair=True)
    encoded = encode(rows, tokenizer, max_length=8, cache_dir=tmp_path)
    expected = tokenizer(rows["text_a"][:], rows["text_b"][:], truncation=True, max_length=8)
    for i, (start, end) in enumerate(zip(encoded.offsets, encoded.offsets[1:], strict=False)):
        assert encoded.input_ids[start:end].tolist() == expected["input_ids"][i]
        assert encoded.token_type_ids is not None
        assert encoded.token_type_ids[start:end].tolist() == expected["token_type_ids"][i]
    assert encoded.lengths.max() == 8
    assert encoded.sample_ids.tolist() == rows["sample_id"][:]
    assert encoded.labels.tolist() == rows["label"][:]
    assert encoded.labels.dtype == np.int64


@pytest.mark.parametrize("pair", [False, True])
def test_the_length_before_a_cut_is_kept(tokenizer: Any, tmp_path: Path, pair: bool) -> None:
    rows = dataset(pair=pair)
    whole = encode(rows, tokenizer, max_length=64, cache_dir=tmp_path)
    assert whole.full_lengths is not None
    assert whole.full_lengths.tolist() == whole.lengths.tolist()
    cut = encode(rows, tokenizer, max_length=6, cache_dir=tmp_path)
    assert cut.full_lengths is not None and cut.lengths.max() == 6
    assert cut.full_lengths.tolist() == whole.lengths.tolist()
    some = cut.subset([4, 1]).full_lengths
    assert some is not None and some.tolist() == cut.full_lengths[[4, 1]].tolist()


def test_second_call_reads_the_cache(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(dataset(), tokenizer, max_length=8, cache_dir=tmp_path)
    monkeypatch.setattr(encoding, "_tokenise", None)
    # A call of the tokenizer leaves padding and truncation set in it; the cache must not care.
    tokenizer(["w1", "w2 w3"], padding=True, truncation=True, max_length=3)
    again = encode(dataset(), tokenizer, max_length=8, cache_dir=tmp_path)
    assert np.array_equal(first.input_ids, again.input_ids)


@pytest.mark.parametrize("change", ["max_length", "rows", "tokenizer", "digest"])
def test_cache_follows_what_goes_in(tokenizer: Any, tmp_path: Path, change: str) -> None:
    encode(dataset(), tokenizer, max_length=8, cache_dir=tmp_path)
    if change == "tokenizer":
        tokenizer.add_tokens(["w1 w2"])
    encode(
        dataset(22 if change == "rows" else 23),
        tokenizer,
        max_length=7 if change == "max_length" else 8,
        cache_dir=tmp_path,
        digest="x" if change == "digest" else "",
    )
    entries = [path for path in (tmp_path / "encoded").iterdir() if path.is_dir()]
    assert len(entries) == 2


def test_damaged_cache_is_made_again(tokenizer: Any, tmp_path: Path) -> None:
    first = encode(dataset(), tokenizer, max_length=8, cache_dir=tmp_path)
    expected = first.input_ids.copy()
    del first
    file = next((tmp_path / "encoded").glob("*/input_ids.npy"))
    file.write_bytes(file.read_bytes()[:-4])
    again = encode(dataset(), tokenizer, max_length=8, cache_dir=tmp_path)
    assert np.array_equal(again.input_ids, expected)


def test_regression_labels_are_floats(tokenizer: Any, tmp_path: Path) -> None:
    encoded = encode(dataset(regression=True), tokenizer, max_length=8, cache_dir=tmp_path)
    batch = next(iter(eval_batches(encoded, batch_size=4)))
    assert batch["labels"].dtype == torch.float32


@pytest.mark.parametrize(("max_length", "pair"), [(2, False), (4, True)])
def test_no_room_for_text(tokenizer: Any, tmp_path: Path, max_length: int, pair: bool) -> None:
    with pytest.raises(DataError, match="leaves no room"):
        encode(dataset(pair=pair), tokenizer, max_length=max_length, cache_dir=tmp_path)


def test_no_rows(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        encode(dataset(0), tokenizer, max_length=8, cache_dir=tmp_path)


def test_padding_and_mask(tokenizer: Any, tmp_path: Path) -> None:
    encoded = encode(dataset(), tokenizer, max_length=16, cache_dir=tmp_path)
    for batch in eval_batches(encoded, batch_size=5, pad_token_id=0):
        mask = batch["attention_mask"].bool()
        if not torch.cuda.is_available():
            assert mask.sum(1).max() == mask.shape[1]
        assert (batch["input_ids"][~mask] == 0).all()
        for row, index in enumerate(batch["index"].tolist()):
            start, end = encoded.offsets[index], encoded.offsets[index + 1]
            assert batch["input_ids"][row][mask[row]].tolist() == (
                encoded.input_ids[start:end].tolist()
            )


def test_subset_takes_whole_samples() -> None:
    encoded = synthetic(10)
    part = encoded.subset([7, 2])
    assert part.sample_ids.tolist() == [7, 2]
    assert part.lengths.tolist() == encoded.lengths[[7, 2]].tolist()
    assert part.input_ids[: part.offsets[1]].tolist() == (
        encoded.input_ids[encoded.offsets[7] : encoded.offsets[8]].tolist()
    )


def test_token_counts() -> None:
    encoded = synthetic(3)
    assert encoded.token_counts(1000).sum() == encoded.num_tokens


@pytest.mark.parametrize("bucket", [True, False])
@pytest.mark.parametrize(("num", "batch_size"), [(100, 8), (103, 8), (8, 8), (5, 8), (15, 8)])
def test_global_batches_do_not_depend_on_the_world(num: int, batch_size: int, bucket: bool) -> None:
    encoded = synthetic(num)
    steps: dict[int, list[list[int]]] = {}
    for world_size, accumulation in ((1, 1), (2, 1), (2, 2), (4, 1)):
        ranks = [
            list(
                TrainBatches(
                    encoded,
                    batch_size=batch_size,
                    world_size=world_size,
                    rank=rank,
                    accumulation=accumulation,
                    seed=5,
                    bucket=bucket,
                ).epoch(1)
            )
            for rank in range(world_size)
        ]
        found = []
        for parts in zip(*ranks, strict=True):
            ids = sorted(i for part in parts for i in part.sample_ids)
            found.append(ids)
            assert all(len(part.micro_batches) == accumulation for part in parts)
            batches = [batch for part in parts for batch in part.micro_batches]
            assert all(len(batch["labels"]) for batch in batches)
            for part in parts:
                assert part.num_samples == len(ids)
                assert part.num_tokens == sum(int(b["attention_mask"].sum()) for b in batches)
                labels = [i for batch in part.micro_batches for i in batch["labels"].tolist()]
                assert labels == part.sample_ids
        steps[world_size * 10 + accumulation] = found
    assert all(found == steps[11] for found in steps.values())
    assert sorted(i for ids in steps[11] for i in ids) == list(range(num))
    assert min(map(len, steps[11])) >= min(num, batch_size)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int, start: int = 0) -> list[list[int]]:
        batches = TrainBatches(synthetic(64), batch_size=8, seed=seed)
        return [step.sample_ids for step in batches.epoch(epoch, start)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 3, start=5) == order(0, 3)[5:]
    assert len(order(0, 0)) == 8


def test_buckets_save_padding() -> None:
    def padding(bucket: bool) -> int:
        batches = TrainBatches(synthetic(512), batch_size=16, bucket=bucket)
        masks = [b["attention_mask"] for step in batches.epoch(0) for b in step.micro_batches]
        return sum(int((mask == 0).sum()) for mask in masks)

    assert padding(True) < padding(False) / 4


def of_pairs(first: Encoded, second: Encoded) -> Encoded:
    """Samples of two sides, as a teacher is fine-tuned on and as encoder-decoders are trained."""
    return replace(first, targets=second.input_ids, target_offsets=second.offsets)


def test_both_sides_of_a_sample_are_counted_and_bucketed() -> None:
    first, second = synthetic(512, seed=1), synthetic(512, seed=2)

    def padding(encoded: Encoded, bucket: bool = True) -> int:
        steps = list(TrainBatches(encoded, batch_size=16, bucket=bucket).epoch(0))
        filled = 0
        for step in steps:
            (batch,) = step.micro_batches
            is_real = torch.cat([batch["attention_mask"] == 1, batch["targets"] != IGNORED], dim=1)
            assert step.num_tokens == int(is_real.sum())
            filled += int((~is_real).sum())
        assert sum(step.num_tokens for step in steps) == first.num_tokens + second.num_tokens
        return filled

    # Lengths that have nothing to do with each other; then a first side of one token.
    assert padding(of_pairs(first, second)) < 0.75 * padding(of_pairs(first, second), bucket=False)
    first = synthetic(512, longest=1)
    assert padding(of_pairs(first, second)) < padding(of_pairs(first, second), bucket=False) / 4


def test_steps_that_ranks_cannot_share() -> None:
    with pytest.raises(DataError, match="a step of 4 samples cannot be shared by 4 workers"):
        TrainBatches(synthetic(100), batch_size=4, world_size=4, accumulation=2)
    with pytest.raises(DataError, match="a step of 3 samples"):
        TrainBatches(synthetic(3), batch_size=32, world_size=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num", [1, 7, 12])
def test_ranks_evaluate_equally_many_batches_of_equal_size(num: int, world_size: int) -> None:
    encoded = synthetic(num)
    shapes, seen, first = [], [], []
    for rank in range(world_size):
        batches = list(eval_batches(encoded, batch_size=2, rank=rank, world_size=world_size))
        shapes.append([len(batch["index"]) for batch in batches])
        seen += [i for batch in batches for i in batch["index"].tolist()]
        first += [i for batch in batches for i in batch["index"][~batch["is_repeat"]].tolist()]
        for batch in batches:
            assert batch["labels"].tolist() == batch["index"].tolist()
    assert all(shape == shapes[0] for shape in shapes)
    assert sorted(first) == list(range(num)), "what is no repeat is there once"
    assert set(seen) == set(range(num))
    assert len(seen) - num < world_size


class _Windows(Classification):
    """Two tokens of each row's text a sample, with all that a kind of task may add."""

    name = "windows"
    is_one_a_row = False

    def tokens(self, rows: Any, tokenizer: Any, **settings: Any) -> TokenRows:
        ids, owners = [], []
        for row, text in enumerate(rows["text_a"]):
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            pieces = [whole[i : i + 2] for i in range(0, len(whole), 2)]
            ids += pieces
            owners += [row] * len(pieces)
        return TokenRows(
            input_ids=ids,
            rows=owners,
            labels=[[row, len(piece)] for row, piece in zip(owners, ids, strict=True)],
            columns={"place": [list(range(1, len(piece) + 1)) for piece in ids]},
            targets=[piece * 2 for piece in ids],
            num_targets=[2 * len(piece) for piece in ids],
        )


def test_a_kind_of_task_makes_several_samples_of_a_row(tokenizer: Any, tmp_path: Path) -> None:
    rows = dataset(9)
    encoded = encode(rows, tokenizer, max_length=8, kind=_Windows(), cache_dir=tmp_path)
    made = _Windows().tokens(rows[:], tokenizer)
    assert len(encoded) == len(made.input_ids) > len(rows)
    assert encoded.sample_ids.tolist() == [100 + row for row in made.rows]
    assert encoded.labels.tolist() == list(made.labels)
    for part in (encoded, encoded.subset(range(len(encoded)))):
        assert part.count_targets(np.array([0, 3])) == made.num_targets[0] + made.num_targets[3]
        chosen = np.array([3, 0, 1])
        batch = collate(part, chosen, pad_token_id=0)
        for place, sample in enumerate(chosen):
            length, written = len(made.input_ids[sample]), made.targets[sample]
            assert batch["place"][place].tolist()[:length] == made.columns["place"][sample]
            assert not batch["place"][place, length:].any()
            assert batch["targets"][place].tolist()[: len(written)] == written
            assert batch["targets"][place, len(written) :].eq(IGNORED).all()
        assert batch["num_targets"].tolist() == [made.num_targets[i] for i in chosen]
    drawn = encoded.draw(4, seed=1)
    assert len(drawn) == 4 and drawn.targets is not None and drawn.num_targets is not None
    assert len(drawn.targets) == drawn.num_targets.sum()


def test_a_step_counts_its_targets_over_ranks_and_micro_batches(
    tokenizer: Any, tmp_path: Path
) -> None:
    encoded = encode(dataset(9), tokenizer, max_length=8, kind=_Windows(), cache_dir=tmp_path)
    ranks = [
        TrainBatches(encoded, batch_size=8, world_size=2, rank=rank, accumulation=2)
        for rank in range(2)
    ]
    for steps in zip(*(one.epoch(0) for one in ranks), strict=True):
        counted = sum(
            int(batch["num_targets"].sum()) for step in steps for batch in step.micro_batches
        )
        assert {step.num_targets for step in steps} == {counted}


def test_what_a_cache_entry_depends_on(tokenizer: Any, tmp_path: Path) -> None:
    def entries(**settings: Any) -> int:
        encode(dataset(5), tokenizer, max_length=8, cache_dir=tmp_path, **settings)
        return len(list((tmp_path / "encoded").glob("*/encoded.json")))

    assert entries() == entries(kind=Classification()) == 1
    assert entries(kind=_Windows()) == 2
    assert entries(options={"stride": 4}) == 3
    assert entries(is_training=False) == 4


@pytest.mark.parametrize(
    ("batch_size", "length", "expected"), [(64, 128, 64), (64, 512, 16), (8, 512, 8), (4, 9000, 1)]
)
def test_a_batch_holds_a_bounded_number_of_tokens(
    batch_size: int, length: int, expected: int
) -> None:
    assert bounded_batch(batch_size, length, 8192) == expected
