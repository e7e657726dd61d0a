"""Language models: blocks, windows, losses and figures against the plain way of each."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional

from moe_dist.conversion.families import FAMILIES
from moe_dist.data.encoding import encode
from moe_dist.data.loaders import collate
from moe_dist.errors import ConversionError, DataError
from moe_dist.inference.skeleton import build_skeleton
from moe_dist.inference.start_tokenizer import read_tokenizer
from moe_dist.losses import tokens as token_losses
from moe_dist.tasks import TASK_KINDS, Answered, causal_lm, model_kind
from moe_dist.tasks.causal_lm import CausalLM, _last, _predicted, _token_ids
from tests.conversion.dense_models import VOCAB_SIZE, tiny_model
from tests.inference.start_models import write_start_model, write_tokenizer

KIND = CausalLM()
END = 2


class Letters:
    """A tokenizer whose tokens are letters, 10 and on; it may put a begin token before a text."""

    eos_token_id: int | None = END
    eos_token = "<end>"
    unk_token_id = 3
    all_special_ids = (1, END, 3)
    all_special_tokens = ()

    def __init__(self, *, begins: bool = False) -> None:
        self.begins = begins

    def ids(self, text: str) -> list[int]:
        """Of one text."""
        return ([1] if self.begins else []) + [10 + ord(c) - ord("a") for c in text]

    def decode(self, ids: list[int]) -> str:
        """Their letters."""
        return "".join(chr(one - 10 + ord("a")) for one in ids)

    def __call__(self, text: list[str], **options: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.ids(one) for one in text]}


def rows(*texts: str) -> dict[str, list[Any]]:
    return {
        "text_a": list(texts),
        "text_b": [None] * len(texts),
        "label": [0] * len(texts),
        "sample_id": [100 + row for row in range(len(texts))],
    }


def cut(
    texts: tuple[str, ...], *, train: bool, length: int, begins: bool = False, **own: int
) -> Any:
    return KIND.tokens(
        rows(*texts),
        Letters(begins=begins),
        max_length=length,
        is_training=train,
        options=own,
    )


TEXTS = ("abc", "d", "", "efghijk", "lm")


@pytest.mark.parametrize("length", [4, 5, 7, 15])
@pytest.mark.parametrize("begins", [False, True])
def test_blocks_hold_every_token_and_each_target_but_first_ones_once(
    length: int, begins: bool
) -> None:
    found = cut(TEXTS, train=True, length=length, begins=begins)
    stream: list[int] = []
    starts: set[int] = set()
    for text in TEXTS:
        if ids := Letters(begins=begins).ids(text):
            starts.add(len(stream))
            stream += [*ids, END]
    # A target stands at the position before it, as one more; a document's first token is none.
    expected = [
        0 if after in starts or after == len(stream) else stream[after] + 1
        for after in range(1, len(stream) + 1)
    ]
    blocks = [list(map(int, ids)) for ids in found.input_ids]
    nexts = [list(map(int, ids)) for ids in found.columns["next_ids"]]
    assert all(len(block) == length for block in blocks[:-1])
    kept = sum(map(len, blocks))
    assert [one for block in blocks for one in block] == stream[:kept]
    assert [one for block in nexts for one in block] == expected[:kept]
    assert not any(expected[kept:])
    assert list(found.num_targets) == [sum(one > 0 for one in block) for block in nexts]


def test_a_block_belongs_to_the_document_that_its_first_token_is_of() -> None:
    assert list(cut(TEXTS, train=True, length=4).rows) == [0, 1, 3, 3][:4]


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (4, 3), (4, 1), (5, 2), (50, 7)])
@pytest.mark.parametrize("begins", [False, True])
def test_windows_predict_each_token_once_with_enough_before_it(
    length: int, stride: int, begins: bool
) -> None:
    found = cut(TEXTS, train=False, length=length, begins=begins, stride=stride)
    seen: dict[tuple[int, int], int] = {}
    for row, ids, next_ids in zip(
        found.rows, found.input_ids, found.columns["next_ids"], strict=True
    ):
        document = Letters(begins=begins).ids(TEXTS[row])
        starts = [
            start
            for start in range(len(document))
            if list(ids) == document[start : start + len(ids)]
        ]
        assert len(ids) <= length
        (start,) = starts
        for place in np.flatnonzero(next_ids).tolist():
            position = start + place + 1
            assert next_ids[place] - 1 == document[position]
            assert (row, position) not in seen
            seen[row, position] = place + 1
            assert place + 1 >= min(position, length - stride)
    wanted = {
        (row, position)
        for row, text in enumerate(TEXTS)
        for position in range(1, len(text) + begins)
    }
    assert set(seen) == wanted


def test_half_a_window_is_the_default_stride() -> None:
    text = ("abcdefghijklmnop",)
    own = cut(text, train=False, length=6)
    assert [list(one) for one in own.input_ids] == [
        list(one) for one in cut(text, train=False, length=6, stride=3).input_ids
    ]


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(DataError, match="have 6 tokens, fewer than one block"):
        cut(("abc", "d"), train=True, length=7)
    with pytest.raises(DataError, match="nothing to predict"):
        cut(("a", ""), train=False, length=7)
    tokenizer = Letters()
    tokenizer.eos_token_id = None
    with pytest.raises(ConversionError, match="no end token"):
        KIND.check_model(None, tokenizer, {})


def test_all_rows_are_packed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_dist.data import encoding

    monkeypatch.setattr(encoding, "_CHUNK_ROWS", 2)
    write_tokenizer(tmp_path / "model", "gpt2")
    tokenizer = read_tokenizer(str(tmp_path / "model"))
    dataset = Dataset.from_dict(rows(*["good film"] * 5))
    encoded = encode(dataset, tokenizer, max_length=4, kind=KIND, cache_dir=tmp_path)
    assert encoded.lengths.tolist() == [4, 4, 4, 3]
    assert encoded.num_targets is not None
    # Each document has two targets: its second word and its end.
    assert encoded.num_targets.sum() == 10


# Models


def language_models() -> list[tuple[str, str]]:
    return [
        (name, head)
        for name, spec in FAMILIES.items()
        for head in spec.heads
        if KIND.owns(head, None) and name != "bart"
    ]


def batch_of(*texts: str, length: int, train: bool = True) -> dict[str, torch.Tensor]:
    made = cut(texts, train=train, length=length)
    from moe_dist.data.encoding import Encoded

    lengths = [len(ids) for ids in made.input_ids]
    encoded = Encoded(
        input_ids=np.concatenate(made.input_ids).astype(np.int32),
        token_type_ids=None,
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        labels=np.zeros(len(lengths), np.int64),
        sample_ids=np.asarray(made.rows, np.int64) + 100,
        columns={"next_ids": np.concatenate(made.columns["next_ids"]).astype(np.int32)},
        num_targets=np.asarray(made.num_targets),
    )
    return collate(encoded, np.arange(len(encoded)), 0)


@pytest.mark.parametrize(("family", "head"), language_models())
def test_a_family_does_nothing_with_logits_but_to_return_them(family: str, head: str) -> None:
    model = tiny_model(family)
    assert type(model).__name__ == head
    assert model_kind(model) is TASK_KINDS["causal_lm"]
    batch = batch_of("abcdefg", "hijk", length=5)
    inputs = KIND.inputs(model, batch)
    with torch.no_grad():
        logits = model(**inputs).logits
        found = KIND.predictions(model, KIND.run(model, batch), batch)
    chosen = logits[batch["next_ids"] > 0]
    made = functional.linear(found.hidden_TD, found.weight_VD, found.bias_V)
    assert torch.allclose(made, chosen, atol=1e-5)
    # And the layer is as it was.
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits)


def test_losses_are_transformers_own_and_gradients_reach_all_weights() -> None:
    model = tiny_model("llama")
    batch = batch_of("abcdefghi", length=10)
    own = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["input_ids"],
    ).loss
    losses_B = KIND.losses(KIND.predictions(model, KIND.run(model, batch), batch), batch)
    # Its ids stand one place later than those of what follows each.
    assert torch.allclose(losses_B.sum() / batch["num_targets"].sum(), own, atol=1e-5)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(own, parameters)
    found = torch.autograd.grad(losses_B.sum() / batch["num_targets"].sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_losses_and_errors_are_by_sample() -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2", n_inner=16)
    texts = ("abcdefg", "hijk", "lmnopqrstuv")
    batch = batch_of(*texts, length=4, train=False)
    with torch.no_grad():
        logits, others = (one(**KIND.inputs(one, batch)).logits for one in (model, other))
        own, teacher = (
            KIND.predictions(one, KIND.run(one, batch), batch) for one in (model, other)
        )
    for row, next_ids in enumerate(batch["next_ids"]):
        places = next_ids > 0
        expected = functional.cross_entropy(
            logits[row, places], next_ids[places] - 1, reduction="sum"
        )
        assert torch.allclose(KIND.losses(own, batch)[row], expected, atol=1e-4)
        p, q = others[row, places].log_softmax(-1), logits[row, places].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum()
        assert torch.allclose(KIND.prediction_errors(own, teacher, batch)[row], kl, atol=1e-4)
    total = KIND.prediction_errors(own, teacher, batch, 2.0).sum()
    assert torch.allclose(KIND.prediction_loss(own, teacher, batch, 2.0), total)
    assert torch.allclose(KIND.soft_target_loss(own, teacher, batch, 2.0), total)
    scored_B = KIND.scored_losses(own, batch)
    assert torch.allclose(scored_B, KIND.losses(own, batch) / batch["num_targets"])


def test_figures_are_of_documents_in_the_order_of_the_rows() -> None:
    model = tiny_model("llama")
    texts = ("abcdefghijk", "x", "lmnopq")
    batch = batch_of(*texts, length=6, train=False)
    labels = np.array(cut(texts, train=False, length=6).labels)
    with torch.no_grad():
        raw = KIND.answer(model, batch, {})
        whole = model(input_ids=torch.tensor([[10 + n for n in range(6)]])).logits[0]
    assert raw.shape == (len(batch["input_ids"]), 2)
    shuffled = np.random.default_rng(0).permutation(len(raw))
    columns = rows(*texts)
    numbers = np.array([100, 100, 100, 102])
    if len(raw) != len(numbers):
        numbers = np.array([100] * (len(raw) - 1) + [102])
    answered = Answered(
        raw=raw.numpy()[shuffled],
        sample_ids=numbers[shuffled],
        labels=labels[shuffled],
        rows=columns,
        columns={},
        offsets=np.zeros(1, np.int64),
        tokenizer=Letters(),
        options={},
    )
    found = KIND.figures(answered)
    assert found.sample_ids.tolist() == [100, 101, 102]
    assert found.values[:, 1].tolist() == [10, 0, 5]
    # Of what is predicted: nothing is left of a text of one token.
    assert found.values[:, 2].tolist() == [1, 0, 1]
    assert found.values[:, 3].tolist() == [10, 0, 5]
    first = functional.cross_entropy(whole[:5], torch.tensor([11, 12, 13, 14, 15]))
    assert math.isfinite(first)
    assert np.isclose(found.values[0, 0], raw.numpy()[numbers == 100, 0].sum(), rtol=1e-6)


@pytest.mark.parametrize(("begins", "expected"), [(False, "bc de"), (True, "abc de")])
def test_words_and_bytes_are_of_what_is_predicted(begins: bool, expected: str) -> None:
    tokenizer = Letters(begins=begins)
    assert _predicted(tokenizer, "abc de", np.array(tokenizer.ids("abc de"))) == expected


def test_words_and_bytes_are_counted_once_for_each_document() -> None:
    texts = ("lmno pq é", "d", "", "abc abc abc")
    found = cut(texts, train=False, length=4)
    counts = {row: label for row, label in zip(found.rows, found.labels, strict=True) if any(label)}
    assert counts == {0: (3, 9), 3: (3, 10)}
    assert np.sum(found.labels, axis=0).tolist() == [6, 19]
    assert len(found.rows) > 4


def test_the_end_of_a_long_text_keeps_its_begin_token() -> None:
    assert _last([1, 5, 6, 7], 3, 1) == [1, 6, 7]
    assert _last([4, 5, 6, 7], 3, 1) == [5, 6, 7]
    assert _last([1, 5], 3, 1) == [1, 5]


def test_documents_are_tokenised_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causal_lm, "_CHARACTERS", 4)
    found = [ids.tolist() for ids in _token_ids(Letters(), TEXTS)]
    assert found == [Letters().ids(text) for text in TEXTS]


def test_logits_are_made_of_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    own = token_losses._OutputLayer.logits_TV

    def watched(layer: Any, rows: slice, out_TV: Any = None) -> torch.Tensor:
        made = own(layer, rows, out_TV)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(token_losses._OutputLayer, "logits_TV", watched)
    monkeypatch.setattr(token_losses, "MAX_BYTES", 3 * VOCAB_SIZE * 4 * 2)
    monkeypatch.setattr(token_losses, "_LAYERS", 0)
    KIND.answer(tiny_model("gpt2"), batch_of("abcdefghijk", length=12), {})
    assert sizes == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("family", "message"), [("bert", "is an encoder"), ("bart", "is an encoder-decoder")]
)
def test_models_that_see_later_tokens_are_refused(
    family: str, message: str, tmp_path: Path
) -> None:
    write_start_model(tmp_path / "model", family)
    with pytest.raises(ConversionError, match=message):
        build_skeleton(str(tmp_path / "model"), kind=KIND)


def test_a_served_model_writes_on_whatever_stands_beside_a_text_in_a_batch(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from moe_dist.inference.serving import TextModel

    write_start_model(tmp_path / "model", "gpt2", kind="LMHeadModel", n_positions=80)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = read_tokenizer(str(tmp_path / "model"))
    served = TextModel(model, tokenizer, max_length=12)
    texts = ["good film", "dull", "", " ".join(["fine"] * 40)]
    alone = [served.predict([text])["text"][0] for text in texts]
    assert served.predict(texts)["text"].tolist() == alone
    assert served.predict([]).columns.tolist() == ["text"]
    ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
    for _ in range(3):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert alone[0].startswith(tokenizer.decode(ids[0, 2:], skip_special_tokens=True))
    with pytest.raises(DataError, match="one column of texts"):
        served.predict([["a", "b"]])
