"""Rules for recipes that make sentence embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.data_checks import Rule, data_sections
from moe_dist.config.faults import either
from moe_dist.config.run_config import RunConfig

KIND = "embedding"
_RETRIEVAL = ("recall_at_1", "recall_at_10", "mrr")
_SIMILARITY = ("cosine_spearman", "cosine_pearson")


def _teacher_learns_from_pairs(config: RunConfig) -> Iterator[str]:
    data, teacher = config.data, config.teacher_train
    if data.kind != KIND or teacher.num_epochs == 0:
        return
    columns = data.text_columns or ()
    if len(columns) != 2:
        yield (
            f"finetune.num_epochs={teacher.num_epochs} fine-tunes the teacher on pairs of texts, "
            f"and data.text_columns={list(columns)} does not name the two columns of the training "
            "rows that hold them; name them, such as [question, passage], or set "
            "finetune.num_epochs to 0, which takes the model as it is."
        )
    elif data.label_column is not None and set(columns) & set(data.pair_columns or ()):
        yield (
            f"finetune.num_epochs={teacher.num_epochs} fine-tunes the teacher on pairs that belong "
            f"together, and those of data.text_columns={list(columns)} have scores in "
            f"data.label_column={data.label_column}; give training pairs without scores, in "
            "columns of other names, or set finetune.num_epochs to 0."
        )
    if teacher.batch_size < 2 * teacher.accumulation:
        yield (
            f"finetune.batch_size={teacher.batch_size} with an accumulation of "
            f"{teacher.accumulation} leaves a pair alone in its micro-batch, where its texts are "
            f"to be found among those of others; use batch_size {2 * teacher.accumulation} or "
            "more (32 is usual)."
        )


def _student_learns_without_labels(config: RunConfig) -> Iterator[str]:
    if config.data.kind == KIND and config.distill.task_weight > 0:
        yield (
            f"distill.task_weight={config.distill.task_weight:g} is that of a loss on labels, and "
            f"data.kind={KIND} distils on texts without labels; set it to 0."
        )


def _vectors_fit_the_rest(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.kind != KIND:
            continue
        if path != "data":
            yield (
                f"{path}.kind={KIND} has no head of its own, and tasks that share a model have "
                "one each; give it a recipe of its own, with the data set in data itself."
            )
        if data.holdout_samples:
            yield (
                f"{path}.holdout_samples={data.holdout_samples} withholds training rows to choose "
                f"recipes on, and those of {path}.kind={KIND} have no pairs to measure on; set it "
                "to 0."
            )
        metrics = set(data.metrics or ())
        if metrics & set(_SIMILARITY) and data.label_column is None:
            yield (
                f"{path}.metrics={list(data.metrics or ())} compares cosines with scores, and "
                f"{path}.label_column names no column of scores; name it, or measure by "
                f"{either(list(_RETRIEVAL))}."
            )
        elif metrics & set(_RETRIEVAL) and data.label_column is not None:
            yield (
                f"{path}.label_column={data.label_column} gives pairs scores, and "
                f"{path}.metrics={list(data.metrics or ())} finds passages: the second text of a "
                "pair with a low score answers nothing; keep one of them."
            )
    width = config.student.hidden_size
    if config.data.kind == KIND and width is not None:
        yield (
            f"student.hidden_size={width} changes the width of vectors, and data.kind={KIND} "
            "compares them with the teacher's; remove it (student.num_layers and "
            "student.intermediate_size may be smaller)."
        )
    weight = config.distill.adversarial_weight
    if config.data.kind == KIND and weight > 0:
        yield (
            f"distill.adversarial_weight={weight:g} shows a discriminator predictions in a fixed "
            f"range, and data.kind={KIND} has vectors; set it to 0."
        )


_SETS = ("data.source", "data.tasks", "data.kind")
EMBEDDING_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (
        _teacher_learns_from_pairs,
        (
            *_SETS,
            "data.text_columns",
            "data.pair_columns",
            "data.label_column",
            *(
                f"{section}.{key}"
                for section in ("finetune", "train")
                for key in ("num_epochs", "batch_size", "accumulation")
            ),
        ),
    ),
    (_student_learns_without_labels, (*_SETS, "distill.task_weight")),
    (
        _vectors_fit_the_rest,
        (
            *_SETS,
            "data.holdout_samples",
            "data.label_column",
            "data.metrics",
            "distill.adversarial_weight",
            "student.hidden_size",
        ),
    ),
)
