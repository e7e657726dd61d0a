"""What a text says never becomes a special token, whatever the tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from moe_dist.errors import ConversionError, DataError
from moe_dist.tasks.tokens import pad, tokenise

LETTERS = "abcdefghijklmnopqrstuvwxyz<>/|[]"


def bert() -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "the", "end", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad", "unk", "cls", "sep", "mask")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in zip(names, special, strict=True)},
    )


def t5() -> Any:
    """A unigram model, whose vocabulary holds `</s>` as a word of its own."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += [(letter, -5.0) for letter in f"▁{LETTERS}"] + [("▁the", -2.0), ("▁end", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<pad>", "</s>", "<unk>")]
    )
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def gpt2() -> Any:
    """No template, and one token for all purposes."""
    words = ["<|endoftext|>", "<unk>", "the", "end", *LETTERS, "<|", "|>", "endoftext"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", unk_token="<unk>"
    )


def test_rows_are_filled_up_on_the_right_whatever_a_tokenizer_says() -> None:
    tokenizer = gpt2()
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    found = pad(tokenizer, tokenise(tokenizer, ["the end", "the"], max_length=4))
    assert found["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert found["input_ids"][1].tolist() == [2, tokenizer.pad_token_id]


class SlowTokenizer(PreTrainedTokenizer):
    """Words between blanks, in Python alone."""

    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "end", "[", "SEP]")

    def __init__(self, **options: Any) -> None:
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
        super().__init__(**(names | {"sep_token": "[SEP]"} | options))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token) if token in self.words else 1

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        return [2, *token_ids_0, 3, *([] if token_ids_1 is None else [*token_ids_1, 3])]


TOKENIZERS = {"bert": bert, "t5": t5, "gpt2": gpt2, "slow": SlowTokenizer}


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_come_from_the_template_alone(kind: str, pair: bool) -> None:
    tokenizer = TOKENIZERS[kind]()
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    names = tokenizer.all_special_tokens
    texts = [f"the {name} end{name}" for name in names] + ["the end"]
    # Of a pair, the second text alone holds some too.
    second = ["the end", *texts[:-1]] if pair else None
    ids = tokenise(tokenizer, texts, second, max_length=64)["input_ids"]
    expected = tokenizer.num_special_tokens_to_add(pair=pair)
    assert [sum(token in special for token in row) for row in ids] == [expected] * len(texts)
    name = next(name for name in names if name != tokenizer.unk_token)
    plainly = tokenizer(f"the {name} end")["input_ids"]
    assert sum(token in special for token in plainly) > tokenizer.num_special_tokens_to_add()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_texts_are_tokenised_as_ever(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    texts = ["the end", "the <s> end [sep]", "qqq"]
    # A row beside them that is treated apart changes nothing for them, nor for later calls.
    found = tokenise(tokenizer, [*texts, f"the {tokenizer.all_special_tokens[0]}"], max_length=9)
    for text, ids in zip(texts, found["input_ids"], strict=False):
        assert ids == tokenizer(text, truncation=True, max_length=9)["input_ids"]


def test_added_words_that_are_not_special_stay_whole() -> None:
    for tokenizer in (bert(), SlowTokenizer()):
        tokenizer.add_tokens(["superb"])
        added = tokenizer.convert_tokens_to_ids("superb")
        plain = tokenise(tokenizer, ["the superb end", "the [SEP] end"], max_length=20)
        assert added in plain["input_ids"][0]


def test_rows_are_cut_with_their_template() -> None:
    ids = tokenise(bert(), ["the [SEP] the end the end"], max_length=6)["input_ids"][0]
    assert len(ids) == 6 and (ids[0], ids[-1]) == (2, 3)
    assert len(tokenise(bert(), ["the [SEP] the end"], max_length=None)["input_ids"][0]) > 6


def test_segments_follow_the_tokens() -> None:
    tokens = tokenise(bert(), ["the [SEP]", "the"], ["end", "[SEP] end"], max_length=30)
    for ids, types in zip(tokens["input_ids"], tokens["token_type_ids"], strict=True):
        assert len(ids) == len(types) and sum(types) in (2, 7)


def test_a_tokenizer_that_makes_them_all_the_same_is_refused() -> None:
    class Stubborn(SlowTokenizer):
        def _tokenize(self, text: str, **_: Any) -> list[str]:
            return super()._tokenize(text.replace("[ SEP]", "[SEP]"))

    with pytest.raises(DataError, match=r"holds '\[SEP\]', of which this tokenizer \(Stubborn\)"):
        tokenise(Stubborn(), ["the end", "the [SEP] end"], max_length=20)


OFFSETS = {name: make for name, make in TOKENIZERS.items() if name != "slow"}


@pytest.mark.parametrize("kind", OFFSETS)
def test_offsets_say_where_tokens_come_from_in_the_text_as_it_was(kind: str) -> None:
    tokenizer = OFFSETS[kind]()
    names = tokenizer.all_special_tokens
    first = [f"the {name}end" for name in names] + ["the end"]
    second = [f"{name}{name} the {names[0]} end" for name in names] + [f"end {names[-1]} the"]
    found = tokenise(tokenizer, first, second, max_length=None, with_offsets=True)
    plain = tokenise(tokenizer, first, second, max_length=None)
    assert found["input_ids"] == plain["input_ids"]
    for row, texts in enumerate(zip(first, second, strict=True)):
        # A token may stand for the beginning of a word alone, and claim its first character.
        read: tuple[set[int], set[int]] = (set(), set())
        for text, start, end in zip(
            found["text"][row], found["start"][row], found["end"][row], strict=True
        ):
            if text >= 0:
                read[text].update(range(start, end))
        for places, whole in zip(read, texts, strict=True):
            expected = {at for at, letter in enumerate(whole) if letter != " "}
            assert {at for at in places if whole[at] != " "} == expected
        ends = [i for i, t in enumerate(found["text"][row]) if t == 1][-1]
        assert found["end"][row][ends] == len(texts[1])


def test_a_tokenizer_without_offsets_says_so_where_they_are_asked_for() -> None:
    with pytest.raises(ConversionError, match=r"SlowTokenizer\) does not say which"):
        tokenise(SlowTokenizer(), ["the end"], max_length=20, with_offsets=True)
