"""export: make a model for transformers of a student, check it against the student, and save it.

A dense one is a task's sub-network, what merged experts are for a task, or the average of all
experts, which is another model: its quality stands beside the student's. A student whose tokens go
to different experts is none of these, and stays what it is.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_dist.errors import ConversionError, MissingInputError, MoeDistError
from moe_dist.whole_files import write_json

from ..report.model_card import CardSubject, model_subject, write_card
from ..report.run_knowledge import read_run
from .export_graph import beside_model, check_free, check_task, stage_words

if TYPE_CHECKING:
    from moe_dist.config import RunConfig

Way = Literal["extract", "fold", "average", "whole"]
RECORD = "export.json"
"""Says beside the weights of an average what it is of, and how good both are."""

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest, that rounding may explain."""
CHECKED_SAMPLES, CHECKED_TOKENS = 8, 32


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        directory: the dense model's.
        kind: its class.
        num_parameters: of it.
        ffn: what its feed-forward layers are, in words.
        difference: the largest difference of its outputs from the model's on random tokens, both
            in float32.
        left_out: what of the model no dense model of its architecture can hold.
        metrics: on the dev rows, of the `model` and the `export`; empty where not measured.
        metric_titles: what people call them.
    """

    directory: Path
    kind: str
    num_parameters: int
    ffn: str
    difference: float
    left_out: str = ""
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    metric_titles: dict[str, str] = field(default_factory=dict)


def default_output(directory: Path, task: str | None, way: Way = "extract") -> Path:
    """Choose a place for the dense model of a task; None for a model of one task.

    Beside the model's directory, or beside its stage where a stage made it, which it then names.
    """
    ways = [way] if way in ("average", "whole") else [] if task else ["dense"]
    words = ["export", *stage_words(directory), *([task] if task else []), *ways]
    return beside_model(directory) / "-".join(words)


def export_task(
    directory: Path,
    task: str | None,
    output: Path,
    *,
    way: Way = "extract",
    config: RunConfig | None = None,
) -> Exported:
    """Write the dense model of one task, or the whole model, with its tokenizer and a card.

    Args:
        directory: of a model of one or several tasks.
        task: its name; None for a model of one task.
        output: where the dense model goes.
        way: "fold" insists on merged experts; "average" takes that of all experts, which
            computes something else; "whole" keeps experts, and all tasks.
        config: the recipe whose dev rows say how good an average is; not measured without.

    Returns:
        What was written.

    Raises:
        MoeDistError: if the output is there already or cannot be written, the task is not named,
            or no dense model does the same.
    """
    from moe_dist.inference import load_model, load_tokenizer
    from moe_dist.inference.saving import model_directory, write_model

    check_free(output)
    is_average = way == "average"
    own = _of_task(config, task) if is_average and config is not None else None
    known = read_run(directory)
    model = load_model(directory, task=None if way == "whole" else task)
    tokenizer = load_tokenizer(directory)
    if way != "average":
        check_task(model, task)
    if way == "fold":
        _check_merged(model)
    written, difference = (model, 0.0) if way == "whole" else _make_dense(model, task, way)
    left_out = _left_out(model) if is_average else ""
    metrics: dict[str, dict[str, float]] = {}
    titles: dict[str, str] = {}
    with model_directory(output) as unfinished:
        write_model(written, unfinished, tokenizer)
        if config is not None and own is not None:
            before, after = _measure(config, directory), _measure(own, unfinished)
            prefix = f"{task}/" if task else ""
            metrics = {
                "model": {name: before["metrics"][f"{prefix}{name}"] for name in after["metrics"]},
                "export": after["metrics"],
            }
            titles = {} if task else before.get("metric_titles", {})
        if is_average:
            moe = model.config.moe
            about = {"average_of": moe["num_experts"], "router": moe["router"]}
            about |= {"left_out": left_out, "difference": difference, "metrics": metrics}
            write_json(unfinished / RECORD, about)
        found = Exported(
            directory=output,
            kind=type(written).__name__,
            num_parameters=sum(parameter.numel() for parameter in written.parameters()),
            ffn=_describe_ffn(written),
            difference=difference,
            left_out=left_out,
            metrics=metrics,
            metric_titles=titles,
        )
        write_card(known, task, _subject(written, tokenizer, way, found), unfinished)
    return found


def keeps_experts(directory: Path) -> bool:
    """Whether the tokens of one task go to different experts, so that no dense model is the same.

    Of a directory without a configuration this says no: whoever loads it says what is wrong.
    """
    from moe_dist.router_spec import router_facts

    try:
        moe = json.loads((directory / "config.json").read_text(encoding="utf-8")).get("moe")
        return (
            bool(moe)
            and moe["num_experts"] > 1
            and router_facts(moe["router"]).chooses_by != "task"
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MoeDistError):
        return False


def _make_dense(model: Any, task: str | None, way: Way) -> tuple[Any, float]:
    """A dense model in the model's precision, and how far it lies from it in float32."""
    from moe_dist.conversion.extract import extract_task

    is_average = way == "average"
    # In half precision both would round, each in its own way.
    dtype = model.dtype
    model.float()
    dense = extract_task(model, task, average=True) if is_average else extract_task(model, task)
    difference, scale = _compare(model, dense)
    if not is_average and difference > TOLERANCE * max(1.0, scale):
        raise ConversionError(
            f"the dense model's outputs differ from the model's by {difference:.1e}",
            remedy="report this: both should compute the same",
        )
    return dense.to(dtype), difference


def _describe_ffn(model: Any) -> str:
    from moe_dist.conversion.families import find_slots

    moe: Mapping[str, Any] | None = getattr(model.config, "moe", None)
    if moe and moe["num_experts"] > 1:
        return f"{moe['num_experts']} experts by {moe['router']}"
    return f"{find_slots(model)[0].num_neurons} neurons in each feed-forward layer"


def _subject(model: Any, tokenizer: Any, way: Way, found: Exported) -> CardSubject:
    """What the card says of what was written."""
    from moe_dist.inference.graphs.directory import length_limit

    is_average = way == "average"
    answers = f"at most {found.difference:.1e} from those of the model, on random tokens in float32"
    of_it = ", ".join(
        f"{found.metric_titles.get(name, name)} {value:.4f}"
        for name, value in found.metrics.get("export", {}).items()
    )
    return model_subject(
        model,
        {"whole": "transformers", "average": "average of its experts"}.get(way, "dense"),
        "those of the model: it is the same" if way == "whole" else answers,
        max_length=length_limit(model, tokenizer),
        metrics={"dev metrics, of this average of all experts": of_it} if of_it else {},
        costs_alike=not is_average,
    )


def _check_merged(model: Any) -> None:
    """See that there is something to fold; a ConversionError says what the model is instead."""
    from moe_dist.router_spec import router_facts

    moe: Mapping[str, Any] = getattr(model.config, "moe", None) or {"num_experts": 1}
    if moe["num_experts"] == 1:
        raise ConversionError(
            "the model has no merged experts to fold", remedy="export it without --fold"
        )
    facts = router_facts(moe["router"])
    if not facts.merges:
        other = "without --fold" if facts.chooses_by == "task" else "with --average"
        raise ConversionError(
            f"{moe['router']} sends tokens to experts and does not merge them, so there is nothing "
            "to fold",
            remedy=f"export it {other}, or fold a student of moe.router=merged_task",
        )


def _left_out(model: Any) -> str:
    if model.config.moe["router"] != "merged_token":
        return ""
    return "the small network of each token that merged_token adds to what experts read"


def _of_task(config: RunConfig, task: str | None) -> RunConfig:
    """A recipe with the data of one of its tasks alone."""
    from moe_dist.config.data_section import DataConfig

    if task is None:
        return config
    own = (config.data.tasks or {}).get(task)
    if own is None:
        raise MissingInputError(
            f"the recipe {config.name} has no task {task!r}",
            remedy="give the recipe that the model was trained with",
        )
    return config.model_copy(update={"data": DataConfig.model_validate(own.model_dump())})


def _measure(config: RunConfig, model: Path) -> dict[str, Any]:
    """Run a saved model over the dev rows."""
    from moe_dist.jobs.predict import PredictJob

    with tempfile.TemporaryDirectory() as scratch:
        return PredictJob.of(config, scratch, model=str(model)).run()


def _compare(model: Any, dense: Any) -> tuple[float, float]:
    """The largest difference of outputs on random tokens, and the largest of them."""
    import torch

    from moe_dist.conversion.families import position_limit
    from moe_dist.measure.latency import random_batch

    length = min(CHECKED_TOKENS, position_limit(model) or CHECKED_TOKENS)
    batch = random_batch(model, CHECKED_SAMPLES, length)
    with torch.no_grad():
        expected, found = (_tensors(one(**batch)) for one in (model, dense))
    assert expected.keys() == found.keys()
    return (
        max(float((expected[name] - found[name]).abs().max()) for name in expected),
        max(float(one.abs().max()) for one in expected.values()),
    )


def _tensors(output: Any) -> dict[str, Any]:
    """Logits, scores or states, whatever the model's class gives; no key-value cache."""
    import torch

    return {name: one for name, one in output.items() if isinstance(one, torch.Tensor)}
