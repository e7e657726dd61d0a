"""Rules across the keys of the `data` section, and of what several tasks can be combined with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_dist.config.data_section import TASK_KEYS, Kind, Metric, TaskDataConfig
from moe_dist.config.faults import either
from moe_dist.config.run_config import RunConfig
from moe_dist.config.sections import NAME_PATTERN
from moe_dist.uris import is_uri

Rule = Callable[[RunConfig], Iterator[str]]
RESERVED_TASK = "mean"
"""Reports call the mean over all tasks so."""
METRICS_OF_KINDS: dict[Kind, tuple[Metric, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "embedding": ("cosine_spearman", "cosine_pearson", "recall_at_1", "recall_at_10", "mrr"),
    "causal_lm": ("perplexity", "word_perplexity", "bits_per_byte"),
    "question_answering": ("exact_match", "answer_f1"),
    "seq2seq": ("rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "answer_f1", "chrf"),
}
"""What a recipe may measure each kind by."""
KEYS_OF_KINDS: dict[str, tuple[str, ...]] = {
    "pair_columns": ("embedding",),
    "pooling": ("embedding",),
    "normalise": ("embedding",),
    "stride": ("question_answering", "causal_lm"),
    "max_answer_length": ("question_answering",),
    "source_prefix": ("seq2seq",),
    "max_target_length": ("seq2seq",),
    "num_beams": ("seq2seq",),
    "length_penalty": ("seq2seq",),
    "no_repeat_ngram_size": ("seq2seq",),
    "early_stopping": ("seq2seq",),
    "documents": ("causal_lm",),
}
"""Keys that only some kinds of tasks read; given elsewhere they would be ignored in silence."""
# Keys that only some sources read; given elsewhere they would be ignored in silence.
_KEYS_OF_SOURCES = {
    "subset": ("hub",),
    "revision": ("hub",),
    "column_names": ("files",),
    "train": ("hub", "files"),
    "dev": ("hub", "files"),
}
_LISTS = ("label_names", "column_names", "text_columns", "metrics", "unlabelled", "pair_columns")
_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_ONE_TASK_PARTITIONS = ("coactivation", "clustered_importance")


def data_sections(config: RunConfig) -> dict[str, TaskDataConfig]:
    """Give each data set by the path of its keys: `data`, or `data.tasks.NAME` for each task."""
    if config.data.source != "tasks":
        return {"data": config.data}
    return {f"data.tasks.{name}": task for name, task in (config.data.tasks or {}).items()}


def _data_is_named(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.source == "files" and data.train is None:
            yield (
                f"{path}.train is missing, which {path}.source=files needs; give the training "
                "file's path."
            )
        if data.source != "files" and data.name is None:
            example = "nyu-mll/glue" if data.source == "hub" else "vader-movie-reviews"
            yield (
                f"{path}.name is missing, which {path}.source={data.source} needs; "
                f"name the data set, for example {example}."
            )


def _dev_rows_exist(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.source == "files" and data.dev is None and data.dev_size is None:
            yield (
                f"{path}.dev and {path}.dev_size are both missing; "
                f"give the dev file, or how many training rows to hold out ({path}.dev_size=0.1)."
            )
        if data.source != "package" and data.dev is not None and data.dev_size is not None:
            yield (
                f"{path}.dev_size holds rows out of the training rows, and {path}.dev gives dev "
                "rows already; keep one of them."
            )


def _keys_fit_source(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        for key, sources in _KEYS_OF_SOURCES.items():
            if data.source not in sources and getattr(data, key) is not None:
                yield (
                    f"{path}.{key} belongs to {path}.source={' or '.join(sources)}, not "
                    f"{data.source}; remove it."
                )
    if config.data.source == "tasks":
        for key, field in TaskDataConfig.model_fields.items():
            if key != "source" and getattr(config.data, key) != field.default:
                yield (
                    f"data.{key} is not read with data.source=tasks, since each task has its own; "
                    f"move it into data.tasks.NAME.{key}."
                )


def _only_classification_has_classes(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        has_classes = data.kind in (None, "classification")
        if not has_classes and data.label_names is not None:
            yield (
                f"{path}.label_names names classes, and {path}.kind={data.kind} has none; "
                "remove label_names, or use kind classification."
            )


def _positive_label_is_one_of_two(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        label, names = data.positive_label, data.label_names
        if label is None:
            continue
        if data.kind not in (None, "classification"):
            yield (
                f"{path}.positive_label names a class, and {path}.kind={data.kind} has none; "
                "remove positive_label."
            )
        elif names is not None and len(names) > 2:
            yield (
                f"{path}.positive_label={label} chooses one of two classes, and {path}.label_names "
                f"names {len(names)}; remove it: F1 is the mean over all of them."
            )
        elif names is not None and label not in names:
            yield f"{path}.positive_label={label} is no class; use {either(list(names))}."
        if data.metrics is not None and "f1" not in data.metrics:
            yield (
                f"{path}.positive_label={label} is read by f1, which {path}.metrics has not; add "
                "f1, or remove positive_label."
            )


def _metrics_fit_kind(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.kind is None:
            continue
        fitting = METRICS_OF_KINDS[data.kind]
        wrong = [metric for metric in data.metrics or () if metric not in fitting]
        if wrong:
            yield (
                f"{path}.metrics={wrong} cannot measure {path}.kind={data.kind}; use "
                f"{either(list(fitting))}."
            )


def _keys_fit_kind(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        for key, kinds in KEYS_OF_KINDS.items():
            if getattr(data, key) is not None and data.kind not in kinds:
                yield (
                    f"{path}.{key} belongs to {path}.kind={' or '.join(kinds)}, not "
                    f"{data.kind or 'classification'}; remove it."
                )
        prefix, columns = data.source_prefix or (), data.text_columns or ()
        if len(prefix) > 1 and len(prefix) != len(columns):
            yield (
                f"{path}.source_prefix={list(prefix)} is for two texts, and {path}.text_columns "
                f"names {len(columns)}; give one prefix, or two columns."
            )
        if data.num_beams == 1:
            for key in ("length_penalty", "early_stopping"):
                if getattr(data, key) is not None:
                    yield (
                        f"{path}.{key} is read by a search, and {path}.num_beams=1 makes none; "
                        "remove it, or use 2 beams or more."
                    )


def _writing_fits_the_rest(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        if data.kind != "seq2seq":
            continue
        if path != "data":
            yield (
                f"{path}.kind=seq2seq writes texts, and tasks that share a model share no "
                "decoder; give it a recipe of its own, with the data set in data itself."
            )
        for key in ("alignment_weight", "adversarial_weight"):
            weight = getattr(config.distill, key)
            if weight > 0:
                yield (
                    f"distill.{key}={weight:g} compares one vector of a whole sample, which "
                    f"{path}.kind=seq2seq has not; set it to 0 (distill.hidden_weight compares "
                    "the states of all tokens)."
                )


def _unlabelled_rows_are_not_read_for_labels(config: RunConfig) -> Iterator[str]:
    weight = config.distill.task_weight
    for path, data in data_sections(config).items():
        if data.unlabelled is not None and weight > 0:
            yield (
                f"{path}.unlabelled adds rows without labels to the distillation, and "
                f"distill.task_weight={weight:g} reads labels; set it to 0, or remove the rows."
            )


def _names_once(config: RunConfig) -> Iterator[str]:
    for path, data in data_sections(config).items():
        for key in _LISTS:
            names = getattr(data, key) or ()
            if len(set(names)) < len(names):
                yield f"{path}.{key}={list(names)} holds a name twice; give each one once."


def _places(config: RunConfig) -> dict[str, Path | str | None]:
    found: dict[str, Path | str | None] = {"output_dir": config.output_dir}
    for path, data in data_sections(config).items():
        found |= {f"{path}.{key}": getattr(data, key) for key in ("train", "dev")}
        found |= {f"{path}.unlabelled ({place})": place for place in data.unlabelled or ()}
    return found


def _no_credentials_in_places(config: RunConfig) -> Iterator[str]:
    for key, place in _places(config).items():
        # Ray shows what workers are told, and the resolved recipe lies beside the results.
        if is_uri(place) and "@" in str(place).partition("?")[0]:
            yield (
                f"{key} holds a user or a password; give credentials in the environment "
                "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) and leave them out of the URI."
            )


def _uris_are_whole(config: RunConfig) -> Iterator[str]:
    for key, place in _places(config).items():
        match = _ONE_SLASH.match(str(place or ""))
        if match:
            scheme = match.group(1)
            yield (
                f"{key} has one slash behind {scheme}:, where a URI has two; write {scheme}://..., "
                "or an absolute path for a directory of that name."
            )


def _tasks_are_named(config: RunConfig) -> Iterator[str]:
    data = config.data
    if data.source != "tasks":
        for key in TASK_KEYS:
            if getattr(data, key) is not None:
                yield (
                    f"data.{key} belongs to data.source=tasks, not {data.source}; remove it, or "
                    "set data.source to tasks."
                )
        return
    names = list(data.tasks or {})
    if len(names) < 2:
        yield (
            f"data.source=tasks needs two tasks or more, and data.tasks names {len(names)}; name "
            "them, or give the one data set in data itself."
        )
    for name in names:
        if name == RESERVED_TASK or not re.fullmatch(NAME_PATTERN, name):
            yield (
                f"data.tasks.{name} cannot be a task's name; use letters, digits, dots, dashes and "
                f"underscores, and not {RESERVED_TASK!r}."
            )
    if data.mixing_temperature is not None and data.mixing != "temperature":
        yield (
            f"data.mixing_temperature={data.mixing_temperature:g} is read with "
            f"data.mixing=temperature, not {data.mixing or 'size'}; set mixing, or remove it."
        )


def _tasks_fit_the_rest(config: RunConfig) -> Iterator[str]:
    moe, distill = config.moe, config.distill
    by_task = moe.num_experts > 1 and moe.partition == "task_importance"
    if config.data.source != "tasks":
        if by_task:
            yield (
                "moe.partition=task_importance splits by several tasks, and there is one; set "
                "data.source to tasks, or use importance."
            )
        return
    routes_tasks = moe.router_spec.facts.chooses_by == "task"
    if by_task and not routes_tasks:
        yield (
            f"moe.partition=task_importance gives experts to tasks, and moe.router={moe.router} "
            "sends any task's tokens to them; set moe.router to task_gate, or use importance."
        )
    num_places = len(config.data.tasks or {}) * moe.top_k
    if by_task and 0 < num_places < moe.num_experts:
        yield (
            f"moe.num_experts={moe.num_experts} is more than the {num_places} that "
            "moe.partition=task_importance makes of these tasks; set it so, or lower."
        )
    if distill.adversarial_weight > 0:
        yield (
            f"distill.adversarial_weight={distill.adversarial_weight:g} needs one task, since the "
            "discriminator reads logits of one size; set it to 0."
        )
    if moe.num_experts > 1 and routes_tasks and distill.load_balancing_weight > 0:
        yield (
            f"distill.load_balancing_weight={distill.load_balancing_weight:g} evens out the load "
            f"within a batch, and with moe.router={moe.router} a batch is of one task; set it to 0 "
            f"({'noise tries' if moe.merges else 'tasks start spread over'} all experts)."
        )
    if moe.num_experts > 1 and moe.partition in _ONE_TASK_PARTITIONS:
        yield (
            f"moe.partition={moe.partition} looks at the rows of one task, and there are several; "
            "use importance, task_importance or kmeans."
        )
    if config.search.space:
        yield (
            "search.space works on one task, and data.source is tasks; search with a recipe whose "
            "`data` section is that of one of data.tasks."
        )


_SETS = ("data.source", "data.tasks")
_PLACES = (*_SETS, "output_dir", "data.train", "data.dev", "data.unlabelled")
# Each rule with the keys it reads, so that it runs whenever those are sound.
DATA_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    (_data_is_named, (*_SETS, "data.train", "data.name")),
    (_dev_rows_exist, (*_SETS, "data.dev", "data.dev_size")),
    (_keys_fit_source, (*_SETS, *(f"data.{key}" for key in TaskDataConfig.model_fields))),
    (_only_classification_has_classes, (*_SETS, "data.kind", "data.label_names")),
    (
        _positive_label_is_one_of_two,
        (
            *_SETS,
            "data.kind",
            "data.label_names",
            "data.metrics",
            "data.positive_label",
        ),
    ),
    (_metrics_fit_kind, (*_SETS, "data.kind", "data.metrics")),
    (
        _keys_fit_kind,
        (*_SETS, "data.kind", "data.text_columns", *(f"data.{key}" for key in KEYS_OF_KINDS)),
    ),
    (
        _writing_fits_the_rest,
        (*_SETS, "data.kind", "distill.alignment_weight", "distill.adversarial_weight"),
    ),
    (
        _unlabelled_rows_are_not_read_for_labels,
        (*_SETS, "data.unlabelled", "distill.task_weight"),
    ),
    (_names_once, (*_SETS, *(f"data.{key}" for key in _LISTS))),
    (_no_credentials_in_places, _PLACES),
    (_uris_are_whole, _PLACES),
    (_tasks_are_named, (*_SETS, "data.mixing", "data.mixing_temperature")),
    (
        _tasks_fit_the_rest,
        (
            *_SETS,
            "moe.router",
            "moe.num_experts",
            "moe.top_k",
            "moe.partition",
            "distill.adversarial_weight",
            "distill.load_balancing_weight",
            "search.space",
        ),
    ),
)
