"""export: extract a task's sub-network, check it against the model, and save it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.errors import ConversionError, MoeDistError

from ..chain.stage_recovery import stage_of

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
        ffn_size: neurons in each of its feed-forward layers.
        difference: the largest difference of its outputs from the model's on random tokens.
    """

    directory: Path
    kind: str
    num_parameters: int
    ffn_size: int
    difference: float


def default_output(directory: Path, task: str | None) -> Path:
    """Choose a place for the dense model of a task; None for a model of one task.

    Beside the model's directory, or beside its stage where a stage made it.
    """
    stage = stage_of(directory)
    beside = directory.parent if stage is None else stage.parent
    return beside / f"export-{task or 'dense'}"


def export_task(directory: Path, task: str | None, output: Path) -> Exported:
    """Write the dense model of one task, with the model's tokenizer.

    Args:
        directory: of a model of one or several tasks.
        task: its name; None for a model of one task.
        output: where the dense model goes.

    Returns:
        What was written.

    Raises:
        MoeDistError: if the output is there already, the task is not named, or no dense model
            does the same.
    """
    from moe_dist.conversion.extract import extract_task
    from moe_dist.conversion.families import find_slots
    from moe_dist.inference import load_model, load_tokenizer, save_model

    if output.exists() and any(output.iterdir() if output.is_dir() else (output,)):
        raise MoeDistError(
            f"{output} is there already.", remedy="remove it, or choose another with --output."
        )
    model = load_model(directory, task=task)
    dense = extract_task(model, task)
    difference, scale = _compare(model, dense)
    if difference > TOLERANCE * max(1.0, scale):
        raise ConversionError(
            f"the dense model's outputs differ from the model's by {difference:.1e}",
            remedy="report this: both should compute the same",
        )
    save_model(dense, output, tokenizer=load_tokenizer(directory))
    return Exported(
        directory=output,
        kind=type(dense).__name__,
        num_parameters=sum(parameter.numel() for parameter in dense.parameters()),
        ffn_size=find_slots(dense)[0].num_neurons,
        difference=difference,
    )


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
