"""Rules that join several keys, each a small function that yields its faults.

They see settings that are plain and well typed, even where another key was wrong: a rule is
skipped only when one of the keys it reads is itself at fault.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_dist.config.data_checks import DATA_RULES, Rule
from moe_dist.config.embedding_checks import EMBEDDING_RULES
from moe_dist.config.faults import either
from moe_dist.config.language_checks import LANGUAGE_RULES
from moe_dist.config.merge_checks import MERGE_RULES
from moe_dist.config.question_checks import QUESTION_RULES
from moe_dist.config.run_config import RunConfig

_TRACKING_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")


def find_cross_faults(config: RunConfig, faulty: frozenset[str] = frozenset()) -> list[str]:
    """Check the rules that join several keys; one line for each fault, with its remedy.

    `config` has stand-ins for the keys or sections in `faulty`; rules that read them are skipped.
    """
    return [
        fault
        for rule, keys in _RULES
        if not any(_overlaps(key, bad) for key in keys for bad in faulty)
        for fault in rule(config)
    ]


def _overlaps(key: str, bad: str) -> bool:
    return key == bad or key.startswith(bad + ".") or bad.startswith(key + ".")


def _experts_over_ranks(config: RunConfig) -> Iterator[str]:
    experts, ranks = config.moe.num_experts, config.parallel.ep_size
    if experts % ranks:
        below = experts - experts % ranks
        more = either([n for n in (below, below + ranks) if n > 0])
        yield (
            f"moe.num_experts={experts} is not divisible by parallel.ep_size={ranks}; "
            f"use {more} experts, or ep_size {either(_divisors(experts))}."
        )


def _ranks_over_workers(config: RunConfig) -> Iterator[str]:
    workers, ranks = config.parallel.num_workers, config.parallel.ep_size
    if isinstance(workers, tuple):
        sizes = range(workers[0], workers[1] + 1)
        if all(size % ranks for size in sizes):
            fitting = sorted({divisor for size in sizes for divisor in _divisors(size)})
            yield (
                f"parallel.num_workers={_plain(workers)} holds no number that is divisible by "
                f"parallel.ep_size={ranks}; raise its most to {ranks * -(-workers[1] // ranks)}, "
                f"or use ep_size {either(fitting)}."
            )
    elif workers % ranks:
        more = ranks * -(-workers // ranks)
        yield (
            f"parallel.num_workers={workers} is not divisible by parallel.ep_size={ranks}; "
            f"use {more} workers, or ep_size {either(_divisors(workers))}."
        )


def _experts_for_top_k(config: RunConfig) -> Iterator[str]:
    experts, top_k = config.moe.num_experts, config.moe.top_k
    if top_k > experts:
        yield (
            f"moe.top_k={top_k} is more than moe.num_experts={experts}; "
            f"use top_k {experts} or less, or at least {top_k} experts."
        )


def _fitted_start(config: RunConfig) -> Iterator[str]:
    moe = config.moe
    if moe.num_experts == 1:
        return
    if moe.merges:
        return  # The rules of merged experts say what of this they can be.
    if moe.partition == "token_clusters" and moe.router_spec.facts.chooses_by != "token":
        yield (
            "moe.partition=token_clusters gives experts to kinds of tokens, which only token_gate "
            f"tells apart, and moe.router is {moe.router}; set moe.router to token_gate, or use "
            "importance."
        )
    if moe.fits_output and moe.top_k > 1:
        yield (
            f"moe.fit_output fits experts that work alone, and moe.top_k={moe.top_k} adds them up; "
            "set top_k to 1, or fit_output to auto or false."
        )


def _shared_in_expert(config: RunConfig) -> Iterator[str]:
    shared, size = config.moe.num_shared_neurons, config.moe.expert_size
    if shared > size:
        yield (
            f"moe.num_shared_neurons={shared} is more than moe.expert_size={size}, which counts "
            f"the shared neurons too; use at most {size} shared neurons, or experts of at least "
            f"{shared}."
        )


def _tied_needs_shared(config: RunConfig) -> Iterator[str]:
    if config.moe.tie_shared and config.moe.num_shared_neurons == 0:
        yield (
            "moe.tie_shared=true has nothing to tie, since moe.num_shared_neurons=0; "
            "share some neurons, or set moe.tie_shared=false."
        )


def _tied_needs_experts(config: RunConfig) -> Iterator[str]:
    if config.moe.tie_shared and config.moe.num_experts == 1:
        yield (
            "moe.tie_shared=true needs several experts, and moe.num_experts=1 is the plain pruned "
            "dense student; set moe.tie_shared=false, or use 2 experts or more."
        )


def _scratch_is_trained(config: RunConfig) -> Iterator[str]:
    if config.model.teacher.startswith("scratch:") and config.finetune.num_epochs == 0:
        yield (
            f"finetune.num_epochs=0 takes model.teacher={config.model.teacher} as it is, which has "
            "random weights; train it for 1 epoch or more, or choose a trained model."
        )


def _teacher_has_epochs(config: RunConfig) -> Iterator[str]:
    if config.train.num_epochs == 0 and config.finetune.num_epochs is None:
        yield (
            "train.num_epochs=0 trains no student, and no teacher either where finetune.num_epochs "
            "says nothing else; give finetune.num_epochs (0 takes the start model as it is)."
        )


def _layers_once(config: RunConfig) -> Iterator[str]:
    layers = config.moe.layers or ()
    negative = sorted({layer for layer in layers if layer < 0})
    if negative:
        yield f"moe.layers has {either(negative)}; layers are numbered from 0."
    if len(set(layers)) < len(layers):
        yield f"moe.layers={list(layers)} names a layer twice; name each one once."


def _gate_settings_need_a_gate(config: RunConfig) -> Iterator[str]:
    moe = config.moe
    if moe.num_experts == 1:
        return
    spec = moe.router_spec
    if not spec.has_gate:
        is_fixed = spec.facts.has_gate
        router = f"moe.router={moe.router}" + (" and moe.task_map=fixed" if is_fixed else "")
        for section, key in _GATE_SETTINGS:
            value = getattr(getattr(config, section), key)
            if value > 0:
                yield (
                    f"{section}.{key}={value:g} has no gate to work on with {router}; "
                    "set it to 0, or use router token_gate."
                )
    elif moe.gate_jitter > 0 and not spec.facts.reads_hidden and not spec.facts.merges:
        yield (
            f"moe.gate_jitter={moe.gate_jitter:g} scales hidden states, which "
            f"moe.router={moe.router} does not read; set it to 0, or use moe.gate_noise."
        )


_GATE_SETTINGS = (
    ("distill", "load_balancing_weight"),
    ("distill", "z_loss_weight"),
    ("distill", "entropy_weight"),
    ("moe", "gate_noise"),
    ("moe", "gate_jitter"),
)


def _some_loss(config: RunConfig) -> Iterator[str]:
    if not any(getattr(config.distill, key) for key in _LESSONS):
        yield (
            "distill.task_weight, distill.hidden_weight and distill.kl_weight are all 0, and so "
            "are the others, so the student learns nothing; give one of them a weight above 0."
        )


def _heads_divide_width(config: RunConfig) -> Iterator[str]:
    width, heads = config.student.hidden_size, config.student.num_heads
    if width and heads and width % heads:
        yield (
            f"student.hidden_size={width} is not divisible by student.num_heads={heads}; use "
            f"{width - width % heads or heads} or {heads * -(-width // heads)}, or "
            f"{either([n for n in _divisors(width) if n <= 2 * heads])} heads."
        )


def _layer_map_fits(config: RunConfig) -> Iterator[str]:
    student = config.student
    if isinstance(student.layer_map, str):
        return
    layers = list(student.layer_map)
    if student.num_layers is not None and len(layers) != student.num_layers:
        yield (
            f"student.layer_map={layers} names {len(layers)} layers, and student.num_layers is "
            f"{student.num_layers}; name one teacher layer for each student layer."
        )
    if student.num_layers is None:
        yield (
            f"student.layer_map={layers} maps the layers of a shallower student; give "
            f"student.num_layers={len(layers)} too."
        )
    if layers != sorted(set(layers)) or layers[0] < 0:
        yield (
            f"student.layer_map={layers} is not ascending from 0 or more; name each teacher "
            "layer once, in order."
        )


def _samples_for_workers(config: RunConfig) -> Iterator[str]:
    yield from _batch_fault(
        "train", config.train.batch_size, config.train.accumulation, config.parallel.max_workers
    )


def _teacher_samples_for_workers(config: RunConfig) -> Iterator[str]:
    if config.finetune.batch_size is None and config.finetune.accumulation is None:
        return
    teacher = config.teacher_train
    yield from _batch_fault(
        "finetune", teacher.batch_size, teacher.accumulation, config.parallel.max_workers
    )


def _batch_fault(section: str, batch_size: int, accumulation: int, workers: int) -> Iterator[str]:
    least = workers * accumulation
    if batch_size < least:
        accumulations = f", accumulation {batch_size // workers}" if batch_size >= workers else ""
        yield (
            f"{section}.batch_size={batch_size} leaves micro-batches empty, with "
            f"parallel.num_workers={workers} and {section}.accumulation={accumulation}; use "
            f"batch_size {least} or more{accumulations}, or fewer workers."
        )


def _local_is_one_process(config: RunConfig) -> Iterator[str]:
    if config.parallel.launcher == "local" and config.parallel.max_workers > 1:
        yield (
            f"parallel.launcher=local is one process, not parallel.num_workers="
            f"{_plain(config.parallel.num_workers)}; use 1 worker, or launcher ray."
        )


def _tracking_uri_is_served(config: RunConfig) -> Iterator[str]:
    uri = config.tracking.uri
    scheme = uri.partition(":")[0].partition("+")[0]
    if uri and scheme not in _TRACKING_SCHEMES:
        yield (
            f"tracking.uri={uri!r} is no store that MLflow keeps; use sqlite:///PATH/mlflow.db, "
            "a database URI, or the http(s) address of a tracking server."
        )


def _databricks_names(config: RunConfig) -> Iterator[str]:
    tracking = config.tracking
    if tracking.uri.partition(":")[0] == "databricks" and not tracking.experiment.startswith("/"):
        yield (
            f"tracking.experiment={tracking.experiment!r} is no path, which names of experiments "
            f"on Databricks are; use for example /Users/me@example.com/{tracking.experiment}."
        )


def _registered_models_are_logged(config: RunConfig) -> Iterator[str]:
    tracking = config.tracking
    if not tracking.register_model:
        return
    for key in ("enabled", "log_models"):
        if not getattr(tracking, key):
            yield (
                f"tracking.register_model={tracking.register_model!r} registers a logged model, "
                f"and tracking.{key}=false logs none; set it to true, or leave register_model out."
            )
    if set(tracking.register_model) & set("/:"):
        yield (
            f"tracking.register_model={tracking.register_model!r} holds a slash or a colon, which "
            "MLflow does not take in names of models; use letters, digits, dots, dashes and "
            "underscores."
        )


# What teaches a student something by itself; the router's own losses and the discriminator do not.
_LESSONS = (
    "task_weight",
    "hidden_weight",
    "kl_weight",
    "soft_weight",
    "attention_weight",
    "alignment_weight",
    "mapping_weight",
)

# Each rule with the keys it reads, so that it runs whenever those are sound.
_RULES: tuple[tuple[Rule, tuple[str, ...]], ...] = (
    *DATA_RULES,
    *EMBEDDING_RULES,
    *QUESTION_RULES,
    *LANGUAGE_RULES,
    *MERGE_RULES,
    (_experts_over_ranks, ("moe.num_experts", "parallel.ep_size")),
    (_experts_for_top_k, ("moe.num_experts", "moe.top_k")),
    (
        _fitted_start,
        ("moe.num_experts", "moe.partition", "moe.router", "moe.fit_output", "moe.top_k"),
    ),
    (_shared_in_expert, ("moe.num_shared_neurons", "moe.expert_size")),
    (_tied_needs_shared, ("moe.tie_shared", "moe.num_shared_neurons")),
    (_tied_needs_experts, ("moe.tie_shared", "moe.num_experts")),
    (_layers_once, ("moe.layers",)),
    (_scratch_is_trained, ("model.teacher", "finetune.num_epochs")),
    (_teacher_has_epochs, ("train.num_epochs", "finetune.num_epochs")),
    (
        _gate_settings_need_a_gate,
        (
            "moe.router",
            "moe.task_map",
            "moe.num_experts",
            *(f"{section}.{key}" for section, key in _GATE_SETTINGS),
        ),
    ),
    (_some_loss, tuple(f"distill.{key}" for key in _LESSONS)),
    (_heads_divide_width, ("student.hidden_size", "student.num_heads")),
    (_layer_map_fits, ("student.num_layers", "student.layer_map")),
    (_ranks_over_workers, ("parallel.num_workers", "parallel.ep_size")),
    (_samples_for_workers, ("train.batch_size", "train.accumulation", "parallel.num_workers")),
    (
        _teacher_samples_for_workers,
        (
            "train.batch_size",
            "train.accumulation",
            "finetune.batch_size",
            "finetune.accumulation",
            "parallel.num_workers",
        ),
    ),
    (_local_is_one_process, ("parallel.launcher", "parallel.num_workers")),
    (_tracking_uri_is_served, ("tracking.uri",)),
    (_databricks_names, ("tracking.uri", "tracking.experiment")),
    (
        _registered_models_are_logged,
        ("tracking.enabled", "tracking.log_models", "tracking.register_model"),
    ),
)


def _plain(workers: int | tuple[int, int]) -> object:
    return list(workers) if isinstance(workers, tuple) else workers


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
