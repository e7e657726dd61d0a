"""Rules for recipes that answer questions with parts of a context."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.data_checks import Rule, data_sections
from moe_dist.config.run_config import RunConfig

KIND = "question_answering"
STRIDE = 128
"""What `data.stride` is where it is not given."""


def _questions_fit_the_rest(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.kind != KIND:
            continue
        if path != "data":
            yield (
                f"{path}.kind={KIND} scores every token, and tasks that share a model have outputs "
                "for a whole text; give it a recipe of its own, with the data set in data itself."
            )
        columns = data.text_columns
        if columns is not None and len(columns) != 2:
            yield (
                f"{path}.text_columns={list(columns)} names {len(columns)}, and {path}.kind={KIND} "
                "reads two: the question and its context, in this order."
            )
        stride = STRIDE if data.stride is None else data.stride
        if stride >= config.model.max_length:
            given = "" if data.stride is not None else ", as when it is not given,"
            yield (
                f"{path}.stride={stride}{given} is not below "
                f"model.max_length={config.model.max_length}, and windows of a context overlap by "
                "it; lower it, to half of max_length or less."
            )
    weight = config.distill.adversarial_weight
    if config.data.kind == KIND and weight > 0:
        yield (
            f"distill.adversarial_weight={weight:g} shows a discriminator predictions of one size, "
            f"and those of data.kind={KIND} are as long as the text; set it to 0."
        )


QUESTION_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        _questions_fit_the_rest,
        (
            "data.source",
            "data.tasks",
            "data.kind",
            "data.text_columns",
            "data.stride",
            "model.max_length",
            "distill.adversarial_weight",
        ),
    ),
)
