"""What a recipe amounts to before it runs: parameters, FLOPs, tokens and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from moe_dist.config.data_checks import data_sections
from moe_dist.config.merge_checks import segment_faults
from moe_dist.distributed.topology import fitting_ep_size
from moe_dist.errors import ConfigError, ConversionError, NotAtHandError

from ..chain.workspace import Workspace
from ..console import quantity
from ..report.pays import describe_reads, flops_ratio
from ..stages.adapt import keeps_all_neurons, router_options
from .data_summaries import say_summaries
from .topology_facts import cpus_fact, topology_facts

if TYPE_CHECKING:
    from moe_dist.config import RunConfig, TaskDataConfig
    from moe_dist.data.summary import DataSummary
    from moe_dist.tasks import TaskKind

    from ..console import Console

BYTES_FP32 = 4
GIB = 1 << 30
MAX_SEQ_LEN = 128


@dataclass(frozen=True)
class ModelSize:
    """What one model is and costs.

    Attributes:
        name: `teacher`, `student` or a comparison's label.
        total: parameters.
        active: parameters that one token uses.
        flops_per_token: multiply and add count as two.
        ffn_flops_per_token: those of the feed-forward layers.
        memory_gib: weights, gradients, Adam's moments and a frozen teacher, on each rank.
    """

    name: str
    total: int
    active: int
    flops_per_token: float
    ffn_flops_per_token: float
    memory_gib: float


@dataclass
class Sizes:
    """Everything `--dry-run` prints.

    Attributes:
        models: one entry for each model, where the start model's shape is known.
        facts: further lines, as name and text.
        unknown: what could not be known, and why.
        data: what each task's data hold, where they were read; "" where there is one task.
    """

    models: list[ModelSize] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    data: dict[str, DataSummary] = field(default_factory=dict)


def derive_sizes(config: RunConfig, workspace: Workspace) -> Sizes:
    """Derive the sizes of a recipe; nothing is tokenised, which may take minutes.

    Args:
        config: the run's configuration.
        workspace: finds data and start model.

    Returns:
        What could be known; the rest is named under `unknown`.

    Raises:
        ConfigError: if its sentences are longer than the start model reads, or its experts or
            those of a comparison do not fit.
        MoeDistError: if the start model is none for such a task.
    """
    sizes = Sizes()
    seq_len = min(MAX_SEQ_LEN, config.model.max_length)
    num_labels = _add_data(config, workspace, sizes)
    tokens = config.train.batch_size * config.model.max_length
    sizes.facts.append(("tokens per step", f"at most {quantity(tokens)} (padding excluded)"))
    per_rank = math.ceil(
        config.train.batch_size / (config.parallel.max_workers * config.train.accumulation)
    )
    sizes.facts.append(("samples per rank and micro-batch", str(per_rank)))
    sizes.facts.append(("CPUs of a worker, and its threads", cpus_fact(config)))
    sizes.facts += topology_facts(config)
    sizes.facts.append(("FLOPs are for a token in a sequence of", f"{seq_len} tokens"))
    sizes.facts += merge_facts(config)
    try:
        teacher = start_skeleton(workspace, num_labels)
    except NotAtHandError as error:
        sizes.unknown.append(
            "parameters, active parameters, FLOPs per token and memory per rank: they need the "
            f"shape of {config.model.teacher!r}. {error.message}"
        )
        return sizes
    refuse_misfits(teacher, config)
    sizes.models.append(_measure("teacher", teacher, seq_len, config, frozen=0))
    frozen = sizes.models[0].total
    for label in ("", *config.compare):
        own = config.resolve_comparison(label) if label else config
        student = convert_skeleton(teacher, own)
        sizes.models.append(_measure(label or "student", student, seq_len, own, frozen=frozen))
        sizes.facts += read_facts(label, student, seq_len)
    sizes.facts += speedup_facts(config, sizes.models)
    return sizes


def read_facts(label: str, student: Any, seq_len: int) -> list[tuple[str, str]]:
    """Say what a pass of one text reads of a student's experts; nothing where it has no router."""
    from moe_dist.measure.profile import expert_reads

    reads = expert_reads(student, seq_len)
    if reads is None:
        return []
    name = f"experts read at batch 1{f', {label}' if label else ''}"
    return [(name, describe_reads(asdict(reads), "taken to be used evenly"))]


def speedup_facts(config: RunConfig, models: list[ModelSize]) -> list[tuple[str, str]]:
    """Say how a required speed-up stands to FLOPs; nothing where none is required."""
    required = config.evaluate.require_speedup
    if required is None:
        return []
    ratio = flops_ratio(*(asdict(model) for model in models[:2]))
    doubt = ", so it can hardly be had: smaller experts, or a smaller student" * (required > ratio)
    return [("speed-up that is required", f"{required:g} ×; FLOPs say {ratio:.2f} ×{doubt}")]


def merge_facts(config: RunConfig) -> list[tuple[str, str]]:
    """Say what is merged how often, and what that costs; nothing where experts are not merged."""
    moe = config.moe
    if not moe.merges:
        return []
    groups = "task, the same for all its texts"
    if moe.router_spec.facts.chooses_by != "task":
        groups = f"sequence, in a decoder for each {moe.segment_length} tokens of one"
    return [
        (
            "merged experts",
            f"{moe.top_k} of {moe.num_experts} become one for each {groups}; a token then costs "
            f"one expert, and a merge as much as {moe.top_k} tokens",
        )
    ]


def start_skeleton(workspace: Workspace, num_labels: int) -> Any:
    """Build the start model's shape on the meta device; a ConversionError if it cannot be read."""
    from moe_dist.inference.skeleton import build_skeleton

    revision = workspace.config.model.revision
    return build_skeleton(
        workspace.start_model,
        kind=recipe_kind(workspace.config),
        num_labels=num_labels,
        revision=revision,
    )


def recipe_kind(config: RunConfig) -> TaskKind:
    """Say what kind of model a recipe asks for: for several tasks a classifier."""
    from moe_dist.data.tasks import kind_for

    data = config.data
    return kind_for(None if data.tasks else data.kind, data.name, data.subset)


def recipe_options(config: RunConfig) -> dict[str, Any]:
    """Give what a recipe's one kind of task reads beside; several tasks have none."""
    if config.data.tasks:
        return {}
    values = config.data.model_dump(mode="json", include=set(recipe_kind(config).option_names))
    return {name: value for name, value in values.items() if value is not None}


def length_faults(model: Any, config: RunConfig) -> list[str]:
    """Say where the start model has too few positions for the recipe's tokens."""
    from moe_dist.conversion.families import position_limit

    limit = position_limit(model)
    length = config.model.max_length
    if limit is None or length <= limit:
        return []
    kept = model.config.max_position_embeddings - limit
    padding = f" ({limit + kept} less {kept}, up to that of padding)" if kept else ""
    return [
        f"model.max_length: {length} is more than the {limit} positions that the model has"
        f"{padding}; set it to {limit} or less, or choose another model.teacher."
    ]


def refuse_misfits(model: Any, config: RunConfig) -> None:
    """See that a recipe and its comparisons fit the start model's shape.

    Everything that does not is one ConfigError.
    """
    from moe_dist.conversion.families import family_of, find_stacks

    faults = length_faults(model, config)
    for label in ("", *config.compare):
        try:
            own = config.resolve_comparison(label) if label else config
            plan_skeleton(dense_skeleton(model, own), own)
            decodes = any(causal for _, causal in find_stacks(model, family_of(model)))
            faults += [fault for fault in segment_faults(own, decodes) if fault not in faults]
        except ConversionError as error:
            prefix = f"compare.{label}: " if label else ""
            faults.append(f"{prefix}{error.message}; {error.remedy}.")
    if faults:
        raise ConfigError(faults, source=f"{config.name} and {config.model.teacher}")


def dense_skeleton(teacher: Any, config: RunConfig) -> Any:
    """Give the shape of what is split into experts: the teacher, or a smaller student of it.

    Args:
        teacher: a dense model on the meta device.
        config: the configuration of one student.

    Returns:
        A dense model, with shapes only.

    Raises:
        ConversionError: if the student cannot be cut from this teacher, its attention or sentence
            vectors cannot be compared although the recipe asks for it, or neither can be trained
            with recomputation although it does.
    """
    from moe_dist.conversion.shrink import plan_shrink, shrink_model
    from moe_dist.training.companion import check_heads, check_pooling

    _check_recomputation(teacher, config)
    student = teacher
    if config.student.is_smaller:
        # What is kept is not known yet, only how much.
        sizes = config.student.model_dump() | {"init": "random"}
        student = shrink_model(teacher, plan_shrink(teacher, **sizes))
    if config.distill.attention_weight > 0:
        check_heads(student, teacher)
    check_pooling(student, config.distill)
    return student


def _check_recomputation(model: Any, config: RunConfig) -> None:
    if config.train.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ConversionError(
            "train.gradient_checkpointing: transformers cannot recompute activations of "
            f"{type(model).__name__}",
            remedy="leave train.gradient_checkpointing out",
        )


def plan_skeleton(dense: Any, config: RunConfig) -> Any:
    """Plan the split of a dense skeleton, whose scores are not known yet."""
    import torch

    from moe_dist.conversion import PARTITIONS, plan_partition
    from moe_dist.conversion.families import find_slots

    moe = config.moe
    row = PARTITIONS[moe.partition]
    scores = [torch.zeros(slot.num_neurons) for slot in find_slots(dense)]
    return plan_partition(
        scores,
        num_experts=moe.num_experts,
        expert_size=moe.expert_size,
        num_shared_neurons=moe.num_shared_neurons,
        # Methods choose other neurons, in experts of the same shape.
        method="importance" if row.distinct else moe.partition,
        tie_shared=moe.tie_shared,
        layers=moe.layers,
        seed=config.seed,
        expert_scores=[score_F.expand(moe.num_experts, -1) for score_F in scores]
        if row.needs_expert_scores
        else None,
    )


def convert_skeleton(teacher: Any, config: RunConfig) -> Any:
    """Convert a dense model on the meta device into a student that has shapes only."""
    import torch

    from moe_dist.conversion import dense_to_moe

    dense = dense_skeleton(teacher, config)
    plan = plan_skeleton(dense, config)
    if config.student.is_smaller and keeps_all_neurons(plan):
        return dense
    return dense_to_moe(
        dense,
        plan,
        seed=config.seed,
        # Tables of any content have the same shape.
        token_counts=torch.zeros(teacher.config.get_text_config().vocab_size),
        **router_options(config),
    )


def show_sizes(config: RunConfig, console: Console) -> None:
    """Print the sizes of a recipe."""
    sizes = checked_sizes(config, Workspace(config, console))
    content = {"event": "sizes", "name": config.name, **asdict(sizes)}
    console.document(content, lambda: _show(config, sizes, console))


def checked_sizes(config: RunConfig, workspace: Workspace) -> Sizes:
    """Derive the sizes of a recipe, check its start model, and say what its data hold."""
    from moe_dist.inference.pretrained import check_pretrained

    from .preflight import check_start_model, say_merging, say_metrics

    say_merging(workspace)
    sizes = derive_sizes(config, workspace)
    if sizes.data:
        say_metrics(workspace)
    if sizes.models and sizes.data:
        check_start_model(workspace, workspace.rows)
    elif sizes.models:
        # The rows need not be at hand, and a head of any size may be replaced.
        kind = recipe_kind(config)
        names = ("0", "1") if kind.has_classes else None
        num_labels = kind.num_outputs(names)
        check_pretrained(
            workspace.start_model,
            num_labels=num_labels,
            label_names=names,
            kind=kind,
            options=recipe_options(config),
        )
    if sizes.data:
        _add_steps(config, workspace, sizes)
    if sizes.models and sizes.data:
        sizes.data = workspace.summaries
    say_summaries(sizes.data, workspace.console)
    return sizes


def _show(config: RunConfig, sizes: Sizes, console: Console) -> None:
    console.result(f"{config.name}: the recipe is valid; nothing was run.")
    if sizes.models:
        console.result(_table(sizes))
        console.result("¹ weights, gradients, optimizer and teacher; activations come on top")
    for name, text in sizes.facts:
        console.result(f"{name}: {text}")
    for reason in sizes.unknown:
        console.result(f"not known: {reason}")


def _add_data(config: RunConfig, workspace: Workspace, sizes: Sizes) -> int:
    """Note what the data say; a hub data set is not downloaded only to be counted."""
    from moe_dist.data.mixture import Mixture
    from moe_dist.data.tasks import kind_for

    data_sets = data_sections(config)
    num_labels = sum(
        kind_for(data.kind, data.name, data.subset).num_outputs(data.label_names or ("0", "1"))
        for data in data_sets.values()
    )
    if config.data.tasks:
        shown = ", ".join(f"{name} ({data.source})" for name, data in config.data.tasks.items())
        sizes.facts.append(("tasks", shown))
    unread = list(unread_data(data_sets))
    if unread:
        sizes.unknown.append(f"training steps: they need the rows of {', and of '.join(unread)}.")
        return num_labels
    try:
        rows = workspace.rows
    except NotAtHandError as error:
        sizes.unknown.append(f"training steps: {error.message}")
        return num_labels
    sizes.data = {name: splits.summary for name, splits in rows.parts.items()}
    shares = rows.shares if isinstance(rows, Mixture) else (1.0,)
    for (name, splits), share in zip(rows.parts.items(), shares, strict=True):
        counts = f"{len(splits.train)} to train, {len(splits.dev)} for dev"
        if splits.unlabelled is not None:
            counts += f", {len(splits.unlabelled)} without labels to distil on"
        if splits.holdout is not None:
            counts += f", {len(splits.holdout)} to choose recipes on"
        if name:
            counts += f", {share:.1%} of the steps, measured by {splits.main_metric}"
        sizes.facts.append((f"samples, {name}" if name else "samples", counts))
    return rows.num_labels


def _add_steps(config: RunConfig, workspace: Workspace, sizes: Sizes) -> None:
    """Count the steps over rows that were read; those of some kinds of tasks are tokenised."""
    try:
        teacher = workspace.num_steps(config.teacher_train, "finetuned")
        student = workspace.num_steps(config.train, "distilled")
    except NotAtHandError as error:
        sizes.unknown.append(
            f"training steps: they need the tokenizer of {config.model.teacher!r}. {error.message}"
        )
        return
    sizes.facts += [("steps, teacher", str(teacher)), ("steps, student", str(student))]


def unread_data(data_sets: Mapping[str, TaskDataConfig]) -> Iterator[str]:
    """Name the rows that a dry run does not read, and why."""
    from moe_dist.data.sources import missing_files, missing_unlabelled

    for path, data in data_sets.items():
        if data.source == "hub":
            yield f"{data.name!r}, which is not downloaded for a dry run"
        missing = missing_files(data.train, data.dev, path) if data.source == "files" else []
        further = missing_unlabelled(data.unlabelled, path)
        if further and not missing:
            yield f"{' and '.join(further)}, which is not there"
        if missing:
            # A recipe can be checked before its data are at hand; to run it without is an error.
            yield (
                f"{' and '.join(missing)}, which is not there (give your files with --set "
                f"{path}.train=FILE and --set {path}.dev=FILE)"
            )


def _measure(name: str, model: Any, seq_len: int, config: RunConfig, *, frozen: int) -> ModelSize:
    from moe_dist.measure.profile import count_parameters, flops_per_token

    count = count_parameters(model)
    flops = flops_per_token(model, seq_len)
    return ModelSize(
        name=name,
        total=count.total,
        active=count.active,
        flops_per_token=flops.total,
        ffn_flops_per_token=flops.ffn,
        memory_gib=memory_per_rank(model, config, frozen=frozen) / GIB,
    )


def memory_per_rank(model: Any, config: RunConfig, *, frozen: int) -> float:
    """Estimate what one rank holds while it trains a model, activations not counted.

    Args:
        model: the model that is trained; weights not needed.
        config: its configuration.
        frozen: parameters of the teacher that stands beside it.

    Returns:
        Bytes: fp32 weights, gradients and two Adam moments, less what ZeRO and expert
        parallelism spread over the ranks.
    """
    # The fewer workers, the less is spread; an elastic run may come down to its least.
    parallel, num_workers = config.parallel, config.parallel.min_workers
    ep_size = fitting_ep_size(num_workers, config.moe.num_experts, parallel.ep_size)
    experts = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name
    )
    others = sum(parameter.numel() for parameter in model.parameters()) - experts
    total = float(frozen)
    for count, copies in (
        (others, num_workers),
        (experts / ep_size, num_workers // ep_size),
    ):
        moments = 2 / copies if parallel.zero_stage >= 1 else 2.0
        gradients = 1 / copies if parallel.zero_stage >= 2 else 1.0
        total += count * (1 + gradients + moments)
    return BYTES_FP32 * total


def _table(sizes: Sizes) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    headings = ("parameters", "active", "FLOPs/token", "FFN FLOPs", "memory per rank¹")
    for heading in headings:
        table.add_column(heading, justify="right")
    whole = sizes.models[0].ffn_flops_per_token
    for model in sizes.models:
        table.add_row(
            model.name,
            quantity(model.total),
            quantity(model.active),
            quantity(model.flops_per_token),
            f"× {model.ffn_flops_per_token / whole:.3f}",
            f"{model.memory_gib:.2f} GiB",
        )
    return table
