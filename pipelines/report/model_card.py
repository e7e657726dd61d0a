"""The README of an exported model: what it is, how good, how large, of what data and licence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moe_dist.redaction import hide_secrets

from .run_knowledge import RECIPE, RunKnowledge, data_licence, start_licence

if TYPE_CHECKING:
    from moe_dist.conversion.heads import TaskHead
    from moe_dist.inference.graphs.directory import GraphFacts
    from moe_dist.tasks import TaskKind

CARD = "README.md"
_UNKNOWN = "not known here"
_TEXTS = ('"a fine film"', '"it is a fine one"')


@dataclass(frozen=True)
class CardSubject:
    """What the card is of.

    Attributes:
        form: what it was written as.
        what: kind of model, experts, parameters, classes, limits: sentences.
        reader: lines of Python that use it, in its directory.
        weights: of which precision they are.
        answers: how far they lie from the model's own.
        library: that loads it, by the hub's name; nothing is said to the hub where it is empty.
        metrics: lines of the table about this very model, where it was measured.
        costs_alike: whether it does as much for a token as the model that it was made of.
    """

    form: str
    what: str
    reader: str
    weights: str
    answers: str
    library: str = ""
    metrics: Mapping[str, str] = field(default_factory=dict)
    costs_alike: bool = True


def model_card(known: RunKnowledge, task: str | None, subject: CardSubject, num_bytes: int) -> str:
    """Say of an exported model what its run knows.

    Args:
        known: of the run.
        task: the one that it answers, of a model of several.
        subject: what was exported.
        num_bytes: of all files.

    Returns:
        Markdown.
    """
    rows = [*subject.metrics.items(), *_quality(known, task)]
    if subject.costs_alike:
        rows += _cost(known)
    rows += [
        ("stored size", f"{num_bytes / 1e6:.1f} MB; weights {subject.weights}"),
        ("answers", subject.answers),
        ("licence", _licence(known)),
    ]
    title = known.report.name or known.directory.name
    lines = [
        *_front(known, subject),
        f"# {title}{f', {task}' if task else ''} ({subject.form})",
        "",
        subject.what,
        "",
        "```python",
        subject.reader,
        "```",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {_cell(what)} | {_cell(value)} |" for what, value in rows),
    ]
    return hide_secrets("\n".join(lines)) + "\n"


def write_card(known: RunKnowledge, task: str | None, subject: CardSubject, directory: Path) -> int:
    """Write the card of an export beside its other files.

    Args:
        known: of the run.
        task: the one that it answers, of a model of several.
        subject: what was exported.
        directory: of all its files.

    Returns:
        Bytes of the others.
    """
    files = [path for path in directory.rglob("*") if path.is_file()]
    num_bytes = sum(path.stat().st_size for path in files)
    card = model_card(known, task, subject, num_bytes)
    (directory / CARD).write_text(card, encoding="utf-8")
    return num_bytes


def graph_subject(model: Any, facts: GraphFacts, reader: str) -> CardSubject:
    """Describe a graph.

    Args:
        model: that was exported.
        facts: of the graph.
        reader: lines of Python that use it, for kinds of tasks that read one text.

    Returns:
        What the card is made of.
    """
    from moe_dist.inference.graphs.graph_file import PAIRS, TEXTS
    from moe_dist.tasks import TASK_KINDS

    near = facts.file.nearness
    weights = (
        "in float32"
        if facts.precision == "fp32"
        else f"{facts.file.bytes.share_int8:.1%} in int8, tables of embeddings too; biases, norms, "
        "routers and scales in float32"
    )
    return CardSubject(
        form=f"{facts.title}, {facts.precision}",
        what=_describe(model, facts.task.replace("_", " "), facts.labels, facts.max_length),
        reader=reader.replace(TEXTS, PAIRS) if _reads_two(TASK_KINDS[facts.task]) else reader,
        weights=weights,
        answers=f"on random tokens at most {near.largest:.1e} of the largest output from those of "
        f"the model in float32, {near.mean:.1e} on average",
    )


def model_subject(
    model: Any,
    form: str,
    answers: str,
    *,
    max_length: int | None,
    metrics: Mapping[str, str],
    costs_alike: bool,
) -> CardSubject:
    """Describe a model that transformers reads.

    Args:
        model: as it was written.
        form: in the card's title.
        answers: how far they lie from those of the model that it was made of.
        max_length: tokens after which a text has to be cut; None for no limit.
        metrics: lines of the table about this very model, where it was measured.
        costs_alike: whether it does as much for a token as that model.

    Returns:
        What the card is made of.
    """
    from moe_dist.conversion.heads import read_heads
    from moe_dist.inference.graphs.directory import class_names
    from moe_dist.inference.sentence_directory import SentencePooling
    from moe_dist.tasks import model_kind

    kind = model_kind(model)
    heads = read_heads(model)
    names = ", ".join(head.name for head in heads)
    task = f"several tasks ({names})" if heads else kind.name.replace("_", " ")
    pooling = SentencePooling.of(model.config)
    reader = (
        _model_reader(model, kind, heads, max_length)
        if pooling is None
        else _sentence_reader(model)
    )
    return CardSubject(
        form=form,
        what=_describe(model, task, () if heads else class_names(model), max_length),
        reader=reader,
        weights=f"in {str(model.dtype).removeprefix('torch.')}",
        answers=answers,
        library="sentence-transformers" if pooling else "transformers",
        metrics=metrics,
        costs_alike=costs_alike,
    )


def _sentence_reader(model: Any) -> str:
    return "\n".join(
        [
            *_needed_import(model),
            "from sentence_transformers import SentenceTransformer",
            "",
            'model = SentenceTransformer(".")',
            f"answers = model.encode([{_TEXTS[0]}])",
        ]
    )


def _model_reader(
    model: Any, kind: TaskKind, heads: Sequence[TaskHead], max_length: int | None
) -> str:
    """Lines that answer one text, or a pair where the kind reads pairs alone."""
    given = ", ".join(_TEXTS if _reads_two(kind) else _TEXTS[:1])
    cut = "" if max_length is None else f"truncation=True, max_length={max_length}, "
    is_decoder = kind.writes or not kind.takes_encoders
    call = "model.generate(**inputs)" if is_decoder else "model(**inputs)"
    lines = [
        *_needed_import(model),
        f"from transformers import AutoTokenizer, {kind.auto_class}",
        *(["from moe_dist.moe.routing import use_task"] if heads else []),
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = {kind.auto_class}.from_pretrained(".").eval()',
        f'inputs = tokenizer({given}, {cut}return_tensors="pt")',
    ]
    if heads:
        return "\n".join([*lines, f"with use_task(0):  # {heads[0].name}", f"    answers = {call}"])
    return "\n".join([*lines, f"answers = {call}"])


def _needed_import(model: Any) -> list[str]:
    has_experts = bool(getattr(model.config, "moe", None))
    return ["import moe_dist  # makes experts known to transformers"] if has_experts else []


def _reads_two(kind: TaskKind) -> bool:
    return kind.reads_pairs and len(kind.text_columns) > 1


def _describe(model: Any, task: str, labels: Sequence[str], max_length: int | None) -> str:
    """Say in sentences what a model is."""
    from moe_dist.inference.sentence_directory import SentencePooling

    moe = getattr(model.config, "moe", None)
    experts = f", {moe['num_experts']} experts, router {moe['router']}" if moe else ", dense"
    parameters = sum(one.numel() for one in model.parameters())
    said = f"A model for {task} ({type(model).__name__}{experts}, {parameters:,} parameters)."
    pooling = SentencePooling.of(model.config)
    if pooling is not None:
        said += f" A text's vector is the {pooling.pooling} of its tokens' last states"
        said += ", brought to length 1." if pooling.normalise else "."
    if labels:
        names = ", ".join(" ".join(name.split()) for name in labels)
        said += f" Classes, in the order of the outputs: {names}."
    return said + (f" Texts are cut at {max_length} tokens." if max_length else "")


def _front(known: RunKnowledge, subject: CardSubject) -> list[str]:
    """What the hub reads at the top of a card."""
    if not subject.library:
        return []
    licences = start_licence(known)
    entries: dict[str, Any] = {"library_name": subject.library}
    if licences:
        entries["license"] = licences[0] if len(licences) == 1 else licences
    return ["---", yaml.safe_dump(entries, sort_keys=False).rstrip(), "---", ""]


def _quality(known: RunKnowledge, task: str | None) -> list[tuple[str, str]]:
    """Figures of the model itself; none of them was measured on what was exported."""
    report = known.report
    titles = report.metric_titles or {}
    prefix = f"{task}/" if task else ""
    said = ", ".join(
        f"{titles.get(name, name).removeprefix(prefix)} {value:.4f}"
        for name, value in (known.own.metrics or {}).items()
        if name.startswith(prefix) and isinstance(value, float)
    )
    source = report.data.name if report.data else None
    summaries = report.data.summaries if report.data else {}
    figures = "; ".join(
        f"{name}: {one.figures}" if name else one.figures for name, one in summaries.items()
    )
    recipe = f"{report.name or 'that of the run'}, {RECIPE}"
    return [
        ("dev metrics, of the model in float32 before the export", said or _UNKNOWN),
        ("data", ": ".join(part for part in (source, figures) if part) or _UNKNOWN),
        ("recipe", recipe if known.recipe is not None else _UNKNOWN),
    ]


def _cost(known: RunKnowledge) -> list[tuple[str, str]]:
    report, own = known.report, known.own
    flops = own.flops_per_token
    conditions = f"{report.seq_len} tokens, CPU threads: {report.num_threads}"
    times = (own.latency_low_ms or {}).items()
    latency = ", ".join(f"{ms:.1f} ms for {size}" for size, ms in times)
    return [
        ("FLOPs for a token", f"{flops / 1e6:.1f} M" if flops else _UNKNOWN),
        (
            f"latency by torch in float32 ({conditions}; a tenth of passes kept to it)"
            if latency
            else "latency",
            latency or "not measured: `moe-dist benchmark inference` does",
        ),
    ]


def _licence(known: RunKnowledge) -> str:
    """Of the start model and the data, where they say it."""
    found, name, data = start_licence(known), known.start_name, data_licence(known)
    said = f"{', '.join(found)}, as the start model {name}" if found else _UNKNOWN
    if name and not found:
        said += f": that of the start model {name}"
    return f"{said}; the data: {data}" if data else said


def _cell(text: str) -> str:
    """Bring a text into one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
