"""The recipe's `distill` section whole: what joins the losses of `DistillConfig`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from moe_dist.config.sections import (
    LOSS_WEIGHT,
    MAX_LAYERS,
    PLACEMENT,
    DistillConfig,
    Integer,
    Number,
    read_with,
)


def _counts_layers(value: object) -> object:
    if isinstance(value, str) and value in ("all", "last"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_LAYERS:
        return value
    raise ValueError("is neither all, last nor a number of layers; give for example 2.")


LayerChoice = Annotated[Literal["all", "last"] | Integer, BeforeValidator(_counts_layers)]


class ObjectivesConfig(DistillConfig):
    """The loss that the student is trained on, with all its terms."""

    keep_answers_gib: Number = Field(
        json_schema_extra=PLACEMENT,
        default=1.0,
        ge=0,
        le=1_000_000,
        description="Most that frozen teachers' answers to training rows take in the cache, and in "
        "the main memory of each worker, which holds them all, GiB. With more than one epoch they "
        "are taken once, for classes, numbers and vectors, where no loss reads hidden states; "
        "later epochs, and other students of the same teacher and rows, use them. Embeddings that "
        "are trained on pairs of texts have none. 0 asks the teacher in every step.",
    )
    teacher_precision: Literal["same", "int8"] = Field(
        json_schema_extra=read_with(
            *("hidden_weight", "kl_weight", "soft_weight", "alignment_weight", "mapping_weight"),
            *("attention_weight", "adversarial_weight"),
            but_at="same",
        ),
        default="same",
        description="What a frozen teacher's products are computed in, where steps ask it: the "
        "`same` as those of the student (`train.precision`), or `int8`, which takes less time on a "
        "CPU and lets the student follow answers that are rounded: for dense BERT, RoBERTa, XLM-R, "
        "CamemBERT, ELECTRA and DistilBERT, whose attention no loss reads. Other teachers, and "
        "workers of which one cannot, have the `same`, and that is said. Answers that are kept "
        "(`distill.keep_answers_gib`) are always the `same`.",
    )
    hidden_layers: LayerChoice = Field(
        default="all",
        description="Which layers the losses on hidden states, attention and feature mapping "
        "compare: `all`, the `last` one, or every n-th counted back from the last (`2`).",
    )
    soft_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=0.0,
        ge=0,
        description="Weight of soft targets: KL divergence of the student's prediction from the "
        "teacher's, both softened by `distill.temperature`, times its square; squared error of "
        "the output for regression.",
    )
    attention_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=0.0,
        ge=0,
        description="Weight of the squared distance between attention scores before softmax; "
        "student and teacher need equally many heads.",
    )
    alignment_weight: Number = Field(
        json_schema_extra=LOSS_WEIGHT,
        default=0.0,
        ge=0,
        description="Weight of the squared distance between sentence vectors of the last layer.",
    )
    alignment_pooling: Literal["cls", "mean", "max"] = Field(
        json_schema_extra=read_with("alignment_weight", "adversarial_weight"),
        default="cls",
        description="What makes a sentence vector of hidden states: the first token's (`cls`), or "
        "the `mean` or the maximum (`max`) over all tokens.",
    )
    mapping_weight: Number = Field(
        default=0.0,
        ge=0,
        description="Weight of feature mapping: squared distance of hidden states after a learned "
        "projection of each student layer's own.",
    )
    adversarial_weight: Number = Field(
        default=0.0,
        ge=0,
        description="Weight of the adversarial term: the student is rewarded where a "
        "discriminator takes its prediction and sentence vector for the teacher's.",
    )
    adversarial_regularizer: Literal["spectral", "r1"] = Field(
        json_schema_extra=read_with("adversarial_weight"),
        default="spectral",
        description="What keeps the discriminator smooth: `spectral` norm of its weights, or the "
        "`r1` penalty on its gradient at the teacher's vectors.",
    )
    adversarial_learning_rate: Number = Field(
        json_schema_extra=read_with("adversarial_weight"),
        default=1e-3,
        gt=0,
        description="Learning rate of the discriminator's own Adam.",
    )
    adversarial_warmup_fraction: Number = Field(
        json_schema_extra=read_with("adversarial_weight"),
        default=0.1,
        ge=0,
        lt=1,
        description="Fraction of the steps in which only the discriminator learns, before the "
        "adversarial term counts.",
    )
