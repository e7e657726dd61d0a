"""The README of an exported model: what it is, how good, how large, of what data and licence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dist.errors import MissingInputError
from moe_dist.redaction import hide_secrets

from ..chain.stage_recovery import FINISHED, stage_of

if TYPE_CHECKING:
    from moe_dist.inference.onnx.directory import OnnxFacts

_REPORT, _RECIPE = "report.json", "recipe.yaml"
_LICENCE = re.compile(r"^licen[sc]e:\s*(\S.*)$", re.MULTILINE)
_NAMES = {"finetune-teacher": "teacher", "distill": "student"}
"""A stage whose model stands in the report, and its name there where the stage has no label."""
_UNKNOWN = "not known here"

_USE = """```python
import json
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

facts = json.load(open("onnx.json"))
tokenizer = Tokenizer.from_file("tokenizer.json")
session = onnxruntime.InferenceSession(facts["graph"])
rows = tokenizer.encode_batch(["a fine film", "a dull one, and far too long"])
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
feed = {
    name: np.array([getattr(row, columns[name]) for row in rows], np.int64)
    for name in facts["inputs"]
}
answers = dict(zip(facts["outputs"], session.run(list(facts["outputs"]), feed)))
```"""


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


def model_card(
    known: RunKnowledge, task: str | None, model: Any, facts: OnnxFacts, num_bytes: int
) -> str:
    """Say of a graph what its model's run knows.

    Args:
        known: of the run.
        task: the one that it answers, of a model of several.
        model: that was exported.
        facts: of the graph.
        num_bytes: of all files.

    Returns:
        Markdown.
    """
    lines = [
        f"# {known.report.get('name', known.directory.name)}{f', {task}' if task else ''} "
        f"(ONNX, {facts.precision})",
        "",
        _what(model, facts),
        "",
        _USE,
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {what} | {value} |" for what, value in _rows(known, task)),
        f"| stored size | {num_bytes / 1e6:.1f} MB; weights {_weights(facts)} |",
        f"| answers | {_nearness(facts)} |",
        f"| licence | {_licence(known)} |",
    ]
    return hide_secrets("\n".join(lines)) + "\n"


def _what(model: Any, facts: OnnxFacts) -> str:
    moe = getattr(model.config, "moe", None)
    experts = f", {moe['num_experts']} experts, router {moe['router']}" if moe else ", dense"
    labels = f" Classes, in the order of the outputs: {', '.join(facts.labels)}."
    limit = f" Texts are cut at {facts.max_length} tokens." if facts.max_length else ""
    parameters = sum(one.numel() for one in model.parameters())
    return (
        f"A model for {facts.task.replace('_', ' ')} ({type(model).__name__}{experts}, "
        f"{parameters:,} parameters)." + (labels if facts.labels else "") + limit
    )


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


def _weights(facts: OnnxFacts) -> str:
    if facts.precision == "fp32":
        return "in float32"
    return (
        f"{facts.bytes.share_int8:.1%} in int8, tables of embeddings too; biases, norms, routers "
        "and scales in float32"
    )


def _nearness(facts: OnnxFacts) -> str:
    near = facts.nearness
    return (
        f"on random tokens at most {near.largest:.1e} of the largest output from those of the "
        f"model in float32, {near.mean:.1e} on average"
    )


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
    """Of the start model, where its directory says it."""
    start = str(((known.recipe or {}).get("model") or {}).get("teacher") or "")
    card = Path(start) / "README.md"
    if start and card.is_file():
        found = _LICENCE.search(card.read_text(encoding="utf-8"))
        if found:
            return f"{found[1]}, as the start model {Path(start).name}"
    name = Path(start).name if Path(start).is_absolute() else start
    return f"{_UNKNOWN}: that of the start model {name}" if name else _UNKNOWN


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
