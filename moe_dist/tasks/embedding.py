"""A vector for each text, to be compared with those of other texts.

Students are trained without labels: to give the teacher's vectors. A teacher is fine-tuned on pairs
of texts: to find to each question its own passage among those of other pairs. Measured on pairs:
against scores that people gave, or by finding passages among those of all dev rows.

Shapes: B or N texts, S positions, D width, M pairs, P distinct passages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.errors import DataError, MissingInputError
from moe_dist.losses.alignment import POOLINGS
from moe_dist.losses.contrastive import in_batch_negatives
from moe_dist.tasks.forward_kind import ForwardKind
from moe_dist.tasks.kind import (
    IGNORED,
    MODEL_INPUTS,
    Answered,
    DevRows,
    Figures,
    LabelKind,
    TokenRows,
    full_lengths,
)
from moe_dist.tasks.retrieval import ranks
from moe_dist.tasks.tokens import tokenise

POOLING, NORMALISED = "sentence_pooling", "sentence_normalised"
"""Entries of a model's configuration: how tokens become a vector, and if it has length 1."""
MAX_LENGTH = "sentence_max_length"
"""Another: tokens after which sentence-transformers cuts a text; None leaves it to tokenizers."""
_RETRIEVAL = ("recall_at_1", "recall_at_10", "mrr")
_SIMILARITY = ("cosine_spearman", "cosine_pearson")
_SIDES = ("text_a", "text_b")
_DIRECTIONS_SEED = 15
_SMALLEST_LENGTH = 1e-12


class Embedding(ForwardKind):
    """Answers are vectors, (B, D); samples are single texts, of dev rows each distinct one once."""

    name = "embedding"
    auto_class = "AutoModel"
    label: ClassVar[LabelKind] = "none"
    metrics = (*_RETRIEVAL, *_SIMILARITY)
    default_metrics = _RETRIEVAL
    prediction_term = "prediction_cosine"
    distance = "1 − cosine of the vectors"
    unit = "pair"
    columns = ("cosine", "rank")
    option_names = ("pooling", "normalise", "pair_columns")
    reads_pairs = False
    takes_encoder_decoders = False
    is_one_a_row = False
    answers_once = True
    served_columns: ClassVar[Mapping[str, str]] = {"vector": "numbers"}

    @property
    def finetuning(self) -> EmbeddingPairs:
        """Pairs of texts."""
        return _PAIRS

    def owns(self, architecture: str, config: Any) -> bool:
        """A model without a head whose configuration says how it pools."""
        is_base = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
        return is_base and getattr(config, POOLING, None) is not None

    def needs_all_rows(self, *, is_training: bool) -> bool:
        """To measure on, a text that stands in several rows is one sample."""
        return not is_training

    def model_arguments(self, parameters: Sequence[str]) -> dict[str, Any]:
        """No pooler, where a family has one: nothing trains or reads it."""
        name = "add_pooling_layer"
        return {name: False} if name in parameters else {}

    def model_settings(
        self, label_names: Sequence[str] | None, options: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        """How tokens become a vector: their mean, of length 1, where nothing is said."""
        normalise = options.get("normalise")
        return {
            POOLING: options.get("pooling") or "mean",
            NORMALISED: True if normalise is None else normalise,
            MAX_LENGTH: options.get("max_seq_length"),
        }

    def dev_rows(self, options: Mapping[str, Any], *, has_labels: bool) -> DevRows:
        """Pairs of texts, with scores or without."""
        columns = tuple(options.get("pair_columns") or ())
        if len(columns) != 2:
            raise DataError(
                "data.kind=embedding is measured on pairs of texts, and data.pair_columns does not "
                "name their two columns",
                remedy="give for example data.pair_columns=[question, passage], and "
                "data.label_column where the pairs have scores",
            )
        return DevRows(
            columns, "number" if has_labels else "none", _SIMILARITY if has_labels else _RETRIEVAL
        )

    def tokens(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        *,
        max_length: int,
        is_training: bool,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> TokenRows:
        """Make a sample of each text; to measure on, of each distinct one, however often it occurs.

        A label then is that of its row, and which text of the row it is: 0 or 1.
        """
        found = [
            (text, row, side)
            for row, texts in enumerate(zip(*(rows[side] for side in _SIDES), strict=True))
            for side, text in enumerate(texts)
            if text is not None
        ]
        if not is_training:
            first: dict[str, tuple[str, int, int]] = {}
            for one in found:
                first.setdefault(one[0], one)
            found = list(first.values())
        texts = [text for text, _, _ in found]
        tokens = tokenise(tokenizer, texts, max_length=max_length)
        labels = [rows["label"][row] for _, row, _ in found]
        return TokenRows(
            input_ids=tokens["input_ids"],
            rows=[row for _, row, _ in found],
            labels=labels
            if is_training
            else [(label, side) for label, (_, _, side) in zip(labels, found, strict=True)],
            token_type_ids=tokens.get("token_type_ids"),
            full_lengths=full_lengths(tokenizer, texts, None, tokens["input_ids"], max_length),
        )

    def predictions(self, model: nn.Module, output: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The pooled vectors, (B, D) float32; of length 1 where the model says so."""
        config: Any = model.config
        pool = POOLINGS[getattr(config, POOLING)]
        vectors_BD = pool(output.last_hidden_state, batch["attention_mask"])
        return functional.normalize(vectors_BD) if getattr(config, NORMALISED) else vectors_BD

    def losses(self, predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """There is none: texts have no labels."""
        raise MissingInputError(
            "texts without labels have no loss of their own",
            remedy="set distill.task_weight to 0",
        )

    def scored_losses(self, predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """The vector along a direction of length 1, (B,): how much of it a neuron makes.

        Random, and fixed for each sample by its number, whatever batch and rank it is in.
        """
        directions = [
            np.random.default_rng([_DIRECTIONS_SEED, number]).standard_normal(predictions.shape[1])
            for number in batch["sample_ids"].tolist()
        ]
        directions_BD = torch.from_numpy(np.array(directions, np.float32)).to(predictions.device)
        return (predictions.float() * functional.normalize(directions_BD)).sum(dim=1)

    def prediction_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """1 - cosine, plus half the squared distance over the teacher's squared length; summed.

        The second part is equal to the first for vectors of length 1, and holds the length where
        they have any. A vector has no temperature.
        """
        student_BD, teacher_BD = student.float(), teacher.float()
        whole_B = teacher_BD.square().sum(dim=1).clamp(min=_SMALLEST_LENGTH)
        gap_B = (student_BD - teacher_BD).square().sum(dim=1) / whole_B
        return (self.prediction_errors(student, teacher, batch) + gap_B / 2).sum()

    def prediction_errors(
        self,
        student: Tensor,
        teacher: Tensor,
        batch: Mapping[str, Tensor],
        temperature: float = 1.0,
    ) -> Tensor:
        """1 - cosine of each sample's two vectors, (B,)."""
        return 1 - functional.cosine_similarity(student.float(), teacher.float(), dim=1)

    def figures(self, answered: Answered) -> Figures:
        """Give of each pair its cosine, and the rank of its second text among all second texts."""
        pairs = list(zip(*(list(answered.rows[side]) for side in _SIDES), strict=True))
        numbers = {number: row for row, number in enumerate(answered.rows["sample_id"])}
        sides = answered.labels[:, 1].astype(int).tolist()
        places = {
            pairs[numbers[number]][side]: sample
            for sample, (number, side) in enumerate(
                zip(answered.sample_ids.tolist(), sides, strict=True)
            )
        }
        passages = {text: place for place, text in enumerate(dict.fromkeys(b for _, b in pairs))}
        vectors_ND = torch.from_numpy(answered.raw)
        passages_PD = vectors_ND[[places[text] for text in passages]]
        questions_MD = vectors_ND[[places[text] for text, _ in pairs]]
        own_M = torch.tensor([passages[text] for _, text in pairs])
        cosine_M = functional.cosine_similarity(questions_MD, passages_PD[own_M])
        rank_M = ranks(questions_MD, passages_PD, own_M)
        values = torch.stack([cosine_M, rank_M.float()], dim=1).numpy()
        return Figures(
            values,
            np.asarray(list(answered.rows["label"])),
            np.asarray(list(answered.rows["sample_id"]), np.int64),
        )

    def served(self, answers: Tensor, label_names: Sequence[str]) -> list[dict[str, Any]]:
        """The vector."""
        return [{"vector": vector} for vector in answers.tolist()]


class EmbeddingPairs(Embedding):
    """What teachers are fine-tuned on: a sample is a pair, its second text stands as the target.

    Predictions are the vectors of both texts, (B, 2, D). Labels are a number for each text, by
    which equal ones are known.
    """

    is_one_a_row = True
    compares_samples = True
    answers_once = False

    def tokens(
        self,
        rows: Mapping[str, Sequence[Any]],
        tokenizer: Any,
        *,
        max_length: int,
        is_training: bool,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> TokenRows:
        """Make a sample of each row, either text cut at `max_length`."""
        assert is_training, "what is measured on are samples of Embedding"
        sides = [rows[side] for side in _SIDES]
        num_halves = sum(not (a.strip() and (b or "").strip()) for a, b in zip(*sides, strict=True))
        if num_halves:
            raise DataError(
                "a teacher of data.kind=embedding is fine-tuned on pairs of texts, and "
                f"{num_halves} of {len(sides[0])} rows have an empty text or only one",
                remedy="name the two columns of pairs in data.text_columns and remove such rows, "
                "or set finetune.num_epochs to 0",
            )
        for name, texts in zip(("first", "second"), sides, strict=True):
            if len(set(texts)) == 1:
                raise DataError(
                    f"all {len(texts)} training pairs have the same {name} text, so that a teacher "
                    "of data.kind=embedding has nothing to tell apart",
                    remedy="give pairs of other texts, or set finetune.num_epochs to 0",
                )
        first, second = (tokenise(tokenizer, texts, max_length=max_length) for texts in sides)
        return TokenRows(
            input_ids=first["input_ids"],
            rows=range(len(sides[0])),
            labels=[tuple(map(_text_number, pair)) for pair in zip(*sides, strict=True)],
            token_type_ids=first.get("token_type_ids"),
            targets=second["input_ids"],
        )

    def run(self, model: nn.Module, batch: Mapping[str, Tensor], **options: Any) -> list[Any]:
        """Run a model on the first texts, then on the second ones."""
        return [model(**inputs, **options) for inputs in _sides(batch)]

    def predictions(
        self, model: nn.Module, output: list[Any], batch: Mapping[str, Tensor]
    ) -> Tensor:
        """The vectors of both texts, (B, 2, D) float32."""
        sides = zip(output, _sides(batch), strict=True)
        return torch.stack(
            [super(EmbeddingPairs, self).predictions(model, *side) for side in sides], dim=1
        )

    def losses(self, predictions: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Cross entropy of each pair's second text among those of the whole batch."""
        first_BD, second_BD = predictions.unbind(dim=1)
        return in_batch_negatives(first_BD, second_BD, batch["labels"])


_PAIRS = EmbeddingPairs()


def _text_number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _sides(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a model takes of the first texts, and of the second ones."""
    first = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    is_real = batch["targets"] != IGNORED
    second = {
        "input_ids": batch["targets"].where(is_real, 0),
        "attention_mask": is_real.long(),
    }
    if "token_type_ids" in batch:
        second["token_type_ids"] = torch.zeros_like(batch["targets"])
    return first, second
