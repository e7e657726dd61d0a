"""The recipe's `data` section: one data set, or one for each of several tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from moe_dist.config.sections import MAX_SAMPLES, Integer, Number, Section, Switch
from moe_dist.config.yaml_values import WrittenInt

TASK_KEYS = ("tasks", "mixing", "mixing_temperature")
"""Keys that only a recipe of several tasks has."""


def _one_or_many(value: Any) -> Any:
    values = [value] if isinstance(value, str | int) else value
    if not isinstance(values, list | tuple):
        return values
    # Classes are often called 0 and 1; true and false stay faults, since they may be a slip.
    return [_one_name(v) for v in values]


def _one_name(value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return value.text if isinstance(value, WrittenInt) else str(value)


def _rows_or_fraction(value: float) -> float:
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("is neither a fraction nor a number of rows; give for example 0.1 or 500.")
    return int(value)


def _text_keys(value: Any) -> Any:
    # YAML keys may be numbers; as text they are names like any other.
    return (
        {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else value
    )


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
Kind = Literal[
    "classification", "regression", "embedding", "causal_lm", "question_answering", "seq2seq"
]
Metric = Literal[
    "accuracy",
    "f1",
    "matthews",
    "pearson",
    "spearman",
    "perplexity",
    "word_perplexity",
    "bits_per_byte",
    "cosine_spearman",
    "cosine_pearson",
    "recall_at_1",
    "recall_at_10",
    "mrr",
    "exact_match",
    "answer_f1",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "chrf",
]
LOWER_IS_BETTER: tuple[Metric, ...] = ("perplexity", "word_perplexity", "bits_per_byte")
Metrics = Annotated[tuple[Metric, ...], BeforeValidator(_one_or_many), Field(min_length=1)]
# Written as it is, since 1500 rows would else become 1500.0.
RowsOrFraction = Annotated[
    Number, AfterValidator(_rows_or_fraction), PlainSerializer(lambda value: value)
]


class TaskDataConfig(Section):
    """One data set: the sentences of one task."""

    source: Literal["hub", "files", "package"] = Field(
        description="`hub`: a Hugging Face data set; `files`: your own TSV, CSV, JSON or "
        "Parquet; `package`: a set that travels in a package (`vader-movie-reviews`, `bbc-news`)."
    )
    name: str | None = Field(
        default=None,
        description="Data set name: hub name for `hub`, package data set for `package`; for "
        "`files` optionally a GLUE task (`sst2`), whose columns, labels and metrics it takes over.",
    )
    subset: str | None = Field(
        default=None, description="Configuration of a hub data set, such as `rte` of GLUE."
    )
    revision: str | None = Field(
        default=None, description="Hub commit, tag or branch of the data set."
    )
    train: str | None = Field(
        default=None,
        description="`files`: path of the training file (`.tsv`, `.txt`, `.csv`, `.json`, "
        "`.jsonl`, `.ndjson` or `.parquet`, also `.gz`, `.bz2` or `.xz`), or of a directory of its "
        "parts. `hub`: name of the training split (`train` when not given).",
    )
    dev: str | None = Field(
        default=None,
        description="`files`: path of the dev file or directory. `hub`: name of the dev split "
        "(that of the task when neither it nor `data.dev_size` is given).",
    )
    unlabelled: Names | None = Field(
        default=None,
        description="Files of further texts for the distillation alone, beside the training rows, "
        "as `data.train` names files; a label column may be missing and is not read (a target of "
        "`seq2seq` is, where there is one). They need `distill.task_weight: 0`, since nothing else "
        "reads labels. Rows that repeat a dev row, or nearly, are left out; the teacher never "
        "sees any. With several tasks they do not count in how often a task is drawn.",
    )
    dev_size: RowsOrFraction | None = Field(
        default=None,
        gt=0,
        description="Held out of the training rows by the seed, when there is no `data.dev`: a "
        "number of rows, or a fraction below 1. A package has its own default.",
    )
    column_names: Names | None = Field(
        default=None, description="Column names of TSV or CSV files that have no header line."
    )
    text_columns: Names | None = Field(
        default=None,
        max_length=2,
        description="One text column, or two for sentence pairs; known for GLUE tasks and package "
        "data sets. `embedding`: of two columns each text is learned by itself, and with "
        "`finetune.num_epochs` above 0 the teacher first learns which texts belong together.",
    )
    label_column: str | None = Field(
        default=None,
        description="Column that holds the label; known for GLUE tasks and package data sets.",
    )
    label_names: Names | None = Field(
        default=None,
        description="Names of the classes in the order of their numbers, as the label column has "
        "them (`[negative, positive]`, `[0, 1]`; `true` and `false` in quotes); the task's, or "
        "found in the training rows (sorted) when not given. Only where they are given, here, by "
        "the task or the hub, may the column hold the numbers instead.",
    )
    kind: Kind | None = Field(
        default=None,
        description="What the model is to do; classification when neither given nor known from "
        "the task.",
    )
    metrics: Metrics | None = Field(
        default=None,
        description="Metrics on the dev rows, the main one first; the task's when not given. "
        "Perplexities and bits per byte are better the lower, all others the higher, and these "
        "lie within ±1 (chrF too, which sacrebleu gives in hundredths).",
    )
    positive_label: Annotated[str | None, BeforeValidator(_one_name)] = Field(
        default=None,
        description="Of two classes the one that `f1` is about, by its name; the second one of "
        "`data.label_names` when not given, which among names that were found in the rows is the "
        "one that sorts last. F1 of more classes is the mean over all of them.",
    )
    pair_columns: Names | None = Field(
        default=None,
        min_length=2,
        max_length=2,
        description="`embedding`: the two text columns of dev rows, such as `[question, passage]`: "
        "each first text is to find its second one among those of all dev rows, or with "
        "`data.label_column` the cosine is compared with the scores there.",
    )
    pooling: Literal["mean", "cls", "max"] | None = Field(
        default=None,
        description="`embedding`: what makes one vector of a text's last hidden states: their "
        "`mean` over all tokens (also when not given), the first token's (`cls`), or each "
        "dimension's maximum (`max`). Where the model comes with files of sentence-transformers, "
        "these say it.",
    )
    normalise: Switch | None = Field(
        default=None,
        description="`embedding`: bring vectors to length 1 (also when not given). Where the model "
        "comes with files of sentence-transformers, these say it.",
    )
    stride: Integer | None = Field(
        default=None,
        ge=0,
        le=MAX_SAMPLES,
        description="`question_answering`: tokens by which the windows overlap that a context is "
        "cut into where it is too long for `model.max_length`; 128 when not given. `causal_lm`: "
        "tokens by which windows of `model.max_length` tokens follow each other, in which dev "
        "documents are measured, so that every token is predicted once with at least "
        "`model.max_length` less `data.stride` tokens before it; half of `model.max_length` when "
        "not given. The smaller, the lower are perplexities, and the longer it takes.",
    )
    max_answer_length: Integer | None = Field(
        default=None,
        ge=1,
        description="`question_answering`: tokens of the longest answer that is given; 30 when "
        "not given.",
    )
    source_prefix: Annotated[tuple[str, ...] | None, BeforeValidator(_one_or_many)] = Field(
        default=None,
        min_length=1,
        max_length=2,
        description="Of `seq2seq`: put before each text that is read, such as `summarize: `; for "
        "two text columns, which become one text, a list such as `[question: , context: ]`.",
    )
    max_target_length: Integer | None = Field(
        default=None,
        ge=2,
        le=MAX_SAMPLES,
        description="Of `seq2seq`: tokens after which a target is cut, special tokens included, "
        "and after which writing ends where the model does not end it; 64 when not given.",
    )
    num_beams: Integer | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="Of `seq2seq`: beams of the search that writes a text to measure; 4 when not "
        "given, 1 takes the likeliest token each time.",
    )
    length_penalty: Number | None = Field(
        default=None,
        description="Of `seq2seq`: exponent of the length that a beam's log-likelihood is divided "
        "by; the larger, the longer are the texts. 1 when not given.",
    )
    no_repeat_ngram_size: Integer | None = Field(
        default=None,
        ge=0,
        description="Of `seq2seq`: so many tokens in a row are written once in a text at most; 0, "
        "also when not given, sets no limit.",
    )
    early_stopping: Switch | None = Field(
        default=None,
        description="Of `seq2seq`: end a search as soon as there are as many whole texts as beams "
        "(also when not given); `false` goes on while a better one is likely.",
    )
    documents: Literal["file", "headings", "lines", "paragraphs"] | None = Field(
        default=None,
        description="`causal_lm`: how documents are told apart in text files (`.txt`, `.text`, "
        "`.tokens`): `file`: each file is one; `headings`: one begins at each ` = Title = `, as in "
        "WikiText; `lines`: each line is one; `paragraphs`: between empty lines. When not given, "
        "`headings` where a file begins with one, else `file`. Of tables each row is one, but of a "
        "hub's set whose rows are lines, where it says how they are put together.",
    )
    max_train_samples: Integer | None = Field(
        default=None, ge=1, description="Take at most so many training rows, drawn by the seed."
    )
    max_dev_samples: Integer | None = Field(
        default=None, ge=1, description="Take at most so many dev rows, drawn by the seed."
    )
    holdout_samples: Integer = Field(
        default=0,
        ge=0,
        description="Withhold so many whole sentences from the training rows, before they are "
        "drawn; `moe-dist search` chooses on them in place of the dev rows. Drawn by the seed, by "
        "sentence and never by row: training rows that lie in one, equal one or share a text of a "
        "pair are dropped too.",
    )


class DataConfig(TaskDataConfig):
    """The sentences to train and measure on."""

    source: Literal["hub", "files", "package", "tasks"] = Field(  # type: ignore[assignment]
        description="`hub`: a Hugging Face data set; `files`: your own TSV, CSV, JSON or "
        "Parquet; `package`: a set that travels in a package (`vader-movie-reviews`, `bbc-news`); "
        "`tasks`: several of these, one for each task that one model learns, in `data.tasks`."
    )
    tasks: Annotated[dict[str, TaskDataConfig], BeforeValidator(_text_keys)] | None = Field(
        default=None,
        description="With `data.source: tasks`: a mapping from each task's name to its own "
        "`source`, `name`, `train` and so on, the keys of this section. The model has one encoder "
        "and one head for each task; each step is of one task, drawn by the seed.",
    )
    mixing: Literal["size", "temperature"] | None = Field(
        default=None,
        description="How often a task is drawn: by its number of training rows (`size`, also when "
        "not given), or by that number to the power of 1 / `data.mixing_temperature`, which draws "
        "small tasks more often.",
    )
    mixing_temperature: Number | None = Field(
        default=None,
        ge=1,
        description="Of `data.mixing: temperature`: 1 is by size, and the larger it is, the more "
        "alike tasks are drawn; 2 when not given.",
    )
