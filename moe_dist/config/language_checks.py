"""Rules for recipes of language models."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.data_checks import Rule, data_sections
from moe_dist.config.run_config import RunConfig

KIND = "causal_lm"
_ONE_VECTOR = ("alignment_weight", "adversarial_weight")


def _text_fits(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.kind != KIND:
            continue
        if path != "data":
            yield (
                f"{path}.kind={KIND} predicts tokens, and tasks that share a model have outputs "
                "for a whole text; give it a recipe of its own, with the data set in data itself."
            )
        columns = data.text_columns or ()
        if len(columns) > 1:
            yield (
                f"{path}.text_columns={list(columns)} names {len(columns)}, and {path}.kind={KIND} "
                "reads one column of running text; name one, or write both as one text before."
            )
        if data.label_column is not None:
            yield (
                f"{path}.label_column={data.label_column} is not read by {path}.kind={KIND}, which "
                "learns from the text alone; remove it."
            )
        if data.documents is not None and data.source == "package":
            yield (
                f"{path}.documents={data.documents} tells documents of running text apart, and "
                f"{path}.source=package has one in each row; remove it."
            )
        stride, length = data.stride, config.model.max_length
        if stride is not None and not 1 <= stride <= length:
            yield (
                f"{path}.stride={stride} is not between 1 and model.max_length={length}, so that "
                "windows would leave tokens out or stand still; half of max_length is usual."
            )


def _blocks_have_no_vector(config: RunConfig) -> Iterator[str]:
    if config.data.kind != KIND:
        return
    for key in _ONE_VECTOR:
        weight = getattr(config.distill, key)
        if weight > 0:
            yield (
                f"distill.{key}={weight:g} compares one vector of a whole sample, and the samples "
                f"of data.kind={KIND} are blocks of running text; set it to 0 "
                "(distill.hidden_weight compares the states of all tokens)."
            )


_SETS = ("data.source", "data.tasks", "data.kind")
LANGUAGE_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        _text_fits,
        (
            *_SETS,
            "data.text_columns",
            "data.label_column",
            "data.documents",
            "data.stride",
            "model.max_length",
        ),
    ),
    (_blocks_have_no_vector, (*_SETS, *(f"distill.{key}" for key in _ONE_VECTOR))),
)
