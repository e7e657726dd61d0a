"""The README of an exported model: what it is, how good, how large, of what data and licence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import MissingInputError
from moe_dist.redaction import hide_secrets

from ..chain.stage_recovery import FINISHED, stage_of

if TYPE_CHECKING:
    from moe_dist.conversion.heads import TaskHead
    from moe_dist.inference.graphs.directory import GraphFacts
    from moe_dist.tasks import TaskKind

CARD = "README.md"
_REPORT, _RECIPE = "report.json", "recipe.yaml"
_LICENCE = re.compile(r"^licen[sc]e:\s*(\S.*)$", re.MULTILINE)
_NAMES = {"finetune-teacher": "teacher", "distill": "student"}
"""A stage whose model stands in the report, and its name there where the stage has no label."""
_UNKNOWN = "not known here"


@dataclass(frozen=True)
class RunKnowledge:
    """What the run of a model says of it; nothing where no run made it.

    Attributes:
        directory: the model's.
        report: the run's.
        recipe: the run's, with all defaults; None where there is none.
        own: what the report says of this model.
    """

    directory: Path
    report: Mapping[str, Any]
    recipe: Mapping[str, Any] | None
    own: Mapping[str, Any]


def read_run(directory: Path) -> RunKnowledge:
    """Read what lies in the directory of a model's run, and nowhere else.

    A file there that cannot be read is a MissingInputError.
    """
    import yaml

    stage = stage_of(directory.absolute() / "model.safetensors")
    run = directory.absolute().parent if stage is None else stage.parent
    report = _read(run / _REPORT, json.loads) or {}
    recipe = _read(run / _RECIPE, yaml.safe_load)
    return RunKnowledge(directory, report, recipe, _figures(stage, report))


@dataclass(frozen=True)
class CardSubject:
    """What the card is of.

    Attributes:
        form: what it was written as.
        what: kind of model, experts, parameters, classes, limits: sentences.
        reader: lines of Python that use it, in its directory.
        weights: of which precision they are.
        answers: how far they lie from the model's own.
        metadata: for the hub, by name; none is written where it is empty.
        metrics: lines of the table about this very model, where it was measured.
    """

    form: str
    what: str
    reader: str
    weights: str
    answers: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)


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
    licence = _start_licence(known)
    metadata = dict(subject.metadata) | ({"license": licence} if licence else {})
    front = [f"{name}: {value}" for name, value in metadata.items()]
    lines = [
        *(["---", *front, "---", ""] if subject.metadata else []),
        f"# {known.report.get('name', known.directory.name)}{f', {task}' if task else ''} "
        f"({subject.form})",
        "",
        subject.what,
        "",
        "```python",
        subject.reader,
        "```",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in subject.metrics.items()),
        *(f"| {what} | {value} |" for what, value in _rows(known, task)),
        f"| stored size | {num_bytes / 1e6:.1f} MB; weights {subject.weights} |",
        f"| answers | {subject.answers} |",
        f"| licence | {_licence(known)} |",
    ]
    return hide_secrets("\n".join(lines)) + "\n"


def graph_subject(model: Any, facts: GraphFacts, reader: str) -> CardSubject:
    """Describe a graph."""
    near = facts.file.nearness
    weights = (
        "in float32"
        if facts.precision == "fp32"
        else f"{facts.file.bytes.share_int8:.1%} in int8, tables of embeddings too; biases, norms, "
        "routers and scales in float32"
    )
    return CardSubject(
        form=f"{facts.title}, {facts.precision}",
        what=describe_model(model, facts.task, facts.labels, facts.max_length),
        reader=reader,
        weights=weights,
        answers=f"on random tokens at most {near.largest:.1e} of the largest output from those of "
        f"the model in float32, {near.mean:.1e} on average",
    )


def model_subject(model: Any, form: str, answers: str, metrics: Mapping[str, str]) -> CardSubject:
    """Describe a model that transformers reads.

    Args:
        model: as it was written.
        form: in the card's title.
        answers: how far they lie from those of the model that it was made of.
        metrics: lines of the table about this very model, where it was measured.

    Returns:
        What the card is made of.
    """
    from moe_dist.conversion.heads import read_heads
    from moe_dist.inference.graphs.directory import class_names
    from moe_dist.tasks import model_kind

    kind = model_kind(model)
    heads = read_heads(model)
    task = f"several tasks ({', '.join(head.name for head in heads)})" if heads else kind.name
    labels = () if heads else class_names(model)
    return CardSubject(
        form=form,
        what=describe_model(model, task, labels),
        reader=_model_reader(model, kind, heads),
        weights=f"in {str(model.dtype).removeprefix('torch.')}",
        answers=answers,
        metadata={"library_name": "transformers"},
        metrics=metrics,
    )


def _model_reader(model: Any, kind: TaskKind, heads: Sequence[TaskHead]) -> str:
    """Lines that answer one text, or a pair where the kind reads pairs alone."""
    has_experts = bool(getattr(model.config, "moe", None))
    texts = ['"a fine film"', '"it is a fine one"'][: max(1, len(kind.text_columns))]
    given = ", ".join(texts if kind.reads_pairs else texts[:1])
    is_decoder = kind.writes or not kind.takes_encoders
    call = "model.generate(**inputs)" if is_decoder else "model(**inputs)"
    lines = [
        *(["import moe_dist  # makes experts known to transformers"] if has_experts else []),
        f"from transformers import AutoTokenizer, {kind.auto_class}",
        *(["from moe_dist.moe.routing import use_task"] if heads else []),
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        f'model = {kind.auto_class}.from_pretrained(".").eval()',
        f'inputs = tokenizer({given}, return_tensors="pt")',
    ]
    if heads:
        return "\n".join([*lines, f"with use_task(0):  # {heads[0].name}", f"    answers = {call}"])
    return "\n".join([*lines, f"answers = {call}"])


def describe_model(
    model: Any, task: str, labels: Sequence[str] = (), max_length: int | None = None
) -> str:
    """Say in sentences what a model is.

    Args:
        model: of transformers, dense or with experts.
        task: the kind of task.
        labels: its classes, if any.
        max_length: tokens after which a text is cut; None for no limit.

    Returns:
        One line.
    """
    moe = getattr(model.config, "moe", None)
    experts = f", {moe['num_experts']} experts, router {moe['router']}" if moe else ", dense"
    parameters = sum(one.numel() for one in model.parameters())
    said = (
        f"A model for {task.replace('_', ' ')} ({type(model).__name__}{experts}, "
        f"{parameters:,} parameters)."
    )
    if labels:
        said += f" Classes, in the order of the outputs: {', '.join(labels)}."
    return said + (f" Texts are cut at {max_length} tokens." if max_length else "")


def _rows(known: RunKnowledge, task: str | None) -> list[tuple[str, str]]:
    """Figures of the model itself, in float32 by torch; none of them was measured on the graph."""
    report, own = known.report, known.own
    titles = report.get("metric_titles") or {}
    prefix = f"{task}/" if task else ""
    metrics = {
        name.removeprefix(prefix): value
        for name, value in (own.get("metrics") or {}).items()
        if name.startswith(prefix)
    }
    said = ", ".join(
        f"{titles.get(name, name)} {value:.4f}"
        for name, value in metrics.items()
        if isinstance(value, float)
    )
    summaries = (report.get("data") or {}).get("summaries") or {}
    data = "; ".join(
        f"{name + ': ' if name else ''}{one['figures']}" for name, one in summaries.items()
    )
    source = (report.get("data") or {}).get("name")
    flops = own.get("flops_per_token")
    times = own.get("latency_low_ms") or {}
    conditions = f"{report.get('seq_len')} tokens, CPU threads: {report.get('num_threads')}"
    latency = ", ".join(f"{ms:.1f} ms for {size}" for size, ms in times.items())
    name = report.get("name") or "the run's"
    return [
        ("dev metrics, of the model in float32 before the export", said or _UNKNOWN),
        ("data", f"{source}: {data}" if source else _UNKNOWN),
        ("recipe", f"{name}, {_RECIPE}" if known.recipe is not None else _UNKNOWN),
        ("FLOPs for a token", f"{flops / 1e6:.1f} M" if flops else _UNKNOWN),
        (
            f"latency by torch in float32 ({conditions}; a tenth of passes kept to it)"
            if latency
            else "latency",
            latency or "not measured: `moe-dist benchmark inference` does",
        ),
    ]


def _figures(stage: Path | None, report: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a run's report says of the model of a stage; nothing of one that it does not measure."""
    if stage is None:
        return {}
    done = _read(stage / FINISHED, json.loads) or {}
    usual = _NAMES.get(str(done.get("stage")))
    if usual is None:
        return {"metrics": done.get("metrics")}
    found: Mapping[str, Any] | None = report.get(done.get("label") or usual)
    return found or {"metrics": done.get("metrics")}


def _licence(known: RunKnowledge) -> str:
    """Of the start model and the data, where they say it."""
    from moe_dist.data.packages import DATA_PACKAGES

    start = _start_model(known)
    name = Path(start).name if Path(start).is_absolute() else start
    found = _start_licence(known)
    said = f"{found}, as the start model {name}" if found else _UNKNOWN
    if name and not found:
        said += f": that of the start model {name}"
    data = DATA_PACKAGES.get(str(((known.recipe or {}).get("data") or {}).get("name")))
    return f"{said}; the data: {data.package.licence}" if data else said


def _start_licence(known: RunKnowledge) -> str:
    from moe_dist.data.packages import MODEL_PACKAGES, MODEL_PREFIX

    start = _start_model(known)
    if start.startswith(MODEL_PREFIX):
        package = MODEL_PACKAGES.get(start.removeprefix(MODEL_PREFIX))
        return package.licence if package else ""
    card = Path(start) / "README.md"
    found = _LICENCE.search(card.read_text(encoding="utf-8")) if start and card.is_file() else None
    return found[1].strip() if found else ""


def _start_model(known: RunKnowledge) -> str:
    return str(((known.recipe or {}).get("model") or {}).get("teacher") or "")


def _read(path: Path, parse: Callable[[str], Any]) -> Mapping[str, Any] | None:
    """Read entries by name; None where there is no such file."""
    import yaml

    if not path.is_file():
        return None
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = (str(error).splitlines() or [type(error).__name__])[0]
    if not isinstance(found, Mapping):
        why = found if isinstance(found, str) else "it holds no entries by name"
        raise MissingInputError(
            f"{path}, which the model card is made of, cannot be read: {why}",
            remedy="mend it, or move it away: the card then says that it is not known",
        )
    return found
