"""A model that takes texts and answers for each: what MLflow loads and serves.

MLflow's description of a logged model names this module; `_load_pyfunc` is the name it looks for.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moe_dist.conversion.heads import answered_kind, chosen_head
from moe_dist.errors import DataError
from moe_dist.inference.backends import ORACLE, Form
from moe_dist.inference.saving import load_model, load_tokenizer
from moe_dist.tasks import TaskKind

BATCH_SIZE = 32
MAX_LENGTH = 512
_MAX_SAID = 200
"""Characters of names that somebody gave."""

log = logging.getLogger(__name__)


class TextReader:
    """How a model's texts are given, cut and counted, which takes none of its weights.

    Args:
        kind: of task that the model answers.
        tokenizer: the one it was trained with.
        limit: tokens after which a text is cut; None where all of it is read.
        options: of the task.
    """

    def __init__(
        self, kind: TaskKind, tokenizer: Any, *, limit: int | None, options: Mapping[str, Any]
    ) -> None:
        self.kind = kind
        self.limit = limit
        self._tokenizer = tokenizer
        self._options = options

    def columns(self, model_input: Any) -> list[list[str]]:
        """Bring what `predict` takes, or a mapping of columns by name, into columns of texts."""
        names = list(self.kind.text_columns)
        if isinstance(model_input, Mapping):
            own = self._known_columns(list(model_input))
            model_input = list(zip(*(model_input[name] for name in own), strict=True))
        elif names and set(names) <= set(getattr(model_input, "columns", ())):
            unread = [str(name) for name in model_input.columns if name not in names]
            if unread:
                log.warning(
                    "the model reads %s; not read: %s",
                    " and ".join(names),
                    ", ".join(unread)[:_MAX_SAID],
                )
            model_input = model_input[names]
        columns = text_columns(model_input)
        if len(columns) > 1 and not self.kind.reads_pairs:
            raise DataError(
                "the model reads one column of texts, and there are two",
                remedy='send for example {"inputs": ["a fine film", "a dull one"]}',
            )
        return columns

    def _known_columns(self, given: list[str]) -> list[str]:
        """Bring names into the order in which they are read; which one is first is not guessed."""
        names = list(self.kind.text_columns)
        if names and set(names) != set(given):
            raise DataError(
                f"the model reads the columns {', '.join(names)}, and there are "
                f"{', '.join(given)[:_MAX_SAID]}",
                remedy="name these alone, or send texts or pairs without names",
            )
        if not names and len(given) > 1 and self.kind.reads_pairs:
            raise DataError(
                "the model does not know its two texts by name, so which is the first is not known",
                remedy='send pairs, such as {"inputs": [["the first text", "the second"]]}',
            )
        return names or given

    def lengths(self, columns: Sequence[Sequence[str]]) -> list[int]:
        """Count the tokens of each text before any is cut; also while `answers` runs elsewhere."""
        return self.kind.served_lengths(self._counter, columns, self._options)

    @cached_property
    def _counter(self) -> Any:
        """A tokenizer of its own, since one cannot be used by two threads at once."""
        return copy.deepcopy(self._tokenizer)


class TextModel(TextReader):
    """A trained model with its tokenizer.

    Args:
        model: for any kind of task, in evaluation mode.
        tokenizer: the one it was trained with.
        max_length: tokens after which a text is cut.
        options: of the task.
        calibration: what its answers are read with, see `TaskKind.calibrate`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        options: Mapping[str, Any] = MappingProxyType({}),
        calibration: float | None = None,
    ) -> None:
        kind = answered_kind(model)
        limit = kind.served_limit(model, max_length)
        super().__init__(kind, tokenizer, limit=limit, options=options)
        self._model = model
        self._max_length = max_length
        self._calibration = calibration

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Answer for each text, or pair of texts.

        Args:
            model_input: a DataFrame with one or two columns of texts, whatever their names, or a
                list of texts or of pairs of them.
            params: not used; MLflow passes it.

        Returns:
            A DataFrame: `label`, its `score` and the `scores` of all labels by name, which add up
            to 1; of a regression the `value`, of an embedding the `vector`, of a question the
            `answer` (empty for none) and its `score`; or the `text` that it writes (of a
            language model what follows).

        Raises:
            DataError: if these are no texts.
        """
        import pandas

        columns = self.columns(model_input)
        num_texts = len(columns[0])
        rows: list[dict[str, Any]] = []
        for first in range(0, num_texts, BATCH_SIZE):
            rows += self.answers([column[first : first + BATCH_SIZE] for column in columns])
        names = list(self.kind.served_columns)
        return pandas.DataFrame(rows, columns=None if rows else names)

    def answers(self, columns: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """Answer the texts of one batch; they are padded to the longest."""
        return self.kind.serve(
            self._model,
            self._tokenizer,
            columns,
            max_length=self._max_length,
            label_names=self._labels(),
            options=self._options,
            calibration=self._calibration,
        )

    def in_form(self, form: Form) -> TextModel:
        """The same with its model prepared, see `moe_dist.inference.backends`."""
        own = copy.copy(self)
        own._model = form.prepare(self._model)
        return own

    def _labels(self) -> list[str]:
        """The classes in the order of their ids; none where there are none."""
        head = chosen_head(self._model)
        if head is not None:
            return list(head.label_names or ())
        if not self.kind.has_classes:
            return []
        config = self._model.config
        return [str(config.id2label[index]) for index in range(config.num_labels)]


def text_columns(model_input: Any) -> list[list[str]]:
    """Bring what MLflow hands over (see `TextModel.predict`) into one or two columns of texts.

    What is no texts, or more than two columns, is a DataError.
    """
    if hasattr(model_input, "columns"):
        columns = [model_input[name].tolist() for name in model_input.columns]
    else:
        entries = model_input.tolist() if hasattr(model_input, "tolist") else list(model_input)
        rows = [[entry] if isinstance(entry, str) else list(entry) for entry in entries]
        if not rows:
            columns = [[]]
        elif any(len(row) > 2 for row in rows):
            columns = []  # Not made: a row of thousands makes thousands of columns.
        else:
            # Rows of different lengths make columns that are no texts.
            columns = [list(column) for column in zip_longest(*rows)]
    if not 1 <= len(columns) <= 2 or not all(isinstance(t, str) for c in columns for t in c):
        raise DataError(
            "the model reads one or two columns of texts",
            remedy='send for example {"inputs": ["a fine film", "a dull one"]}',
        )
    return columns


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> TextModel:
    """Load a model directory for MLflow.

    Settings are `max_length` (tokens), `task`, `options` and `calibration`, as in `TextModel`, and
    `form`, such as `lean-bf16` (see `moe_dist.inference.backends`).
    """
    settings = model_config or {}
    form = Form.parse(str(settings.get("form") or ORACLE))
    device = "cuda" if torch.cuda.is_available() and form == ORACLE else "cpu"
    model = TextModel(
        load_model(Path(path), device, task=settings.get("task")),
        load_tokenizer(Path(path)),
        max_length=int(settings.get("max_length", MAX_LENGTH)),
        options=settings.get("options") or {},
        calibration=settings.get("calibration"),
    )
    return model if form == ORACLE else model.in_form(form)
