"""What of a start model's weights a task takes over: the whole body, or it is refused.

transformers draws weights anew that it does not find and leaves those out that it does not know,
and says so in a warning at most. A body with one such weight is another model than its name says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.conversion.families import known_family
from moe_dist.data.content import foreign_format
from moe_dist.digests import PICKLES
from moe_dist.errors import ConversionError
from moe_dist.tasks import TASK_KINDS, TaskKind

_HEAD_BYTES = 512
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|attn\.masked_bias|version|_float_tensor)$")
"""Buffers of older transformers that today's models make themselves."""
_WRAPPERS = {
    "module.": "torch.nn.DataParallel or DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "peft",
    "model.": "a module around the model, such as a LightningModule",
}
_OTHER_FORMATS = (*sorted(PICKLES), ".h5", ".msgpack", ".onnx", ".gguf")
_SAME_NAMES = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForMultipleChoice",
    "ForQuestionAnswering",
)
"""Ends of classes whose heads have the same names in some families."""
_SHOWN = 4


@dataclass(frozen=True)
class TakenOver:
    """What happens to a start model's head, once its body is known to be whole.

    Args:
        new: weights that the file lacks.
        replaced: weights of the head that have another shape in the file.
        dropped: weights of other heads.
        has_head: whether the layer that gives the logits comes from the file.
        other_head: the class that the file's head is of, where it is not this one's and the
            weights fit by accident; empty otherwise.
    """

    new: tuple[str, ...]
    replaced: tuple[str, ...]
    dropped: tuple[str, ...]
    has_head: bool
    other_head: str = ""

    def lines(self) -> list[str]:
        """Say in a line each what is new, and what is left out."""
        found = []
        if self.new:
            found.append(f"new: {shown(self.new, limit=len(self.new))}")
        if self.replaced:
            found.append(
                f"new: {shown(self.replaced)}, in place of a head with another number of outputs"
            )
        if self.other_head:
            found.append(f"new: the head; the one there is a {self.other_head}'s")
        if self.dropped:
            found.append(f"not used: {shown(self.dropped)}")
        return found


def read_shapes(directory: Path) -> dict[str, Tensor]:
    """Read names and shapes of a model's weights, and no weight itself.

    Args:
        directory: of the model.

    Returns:
        Zeros in each weight's shape, which take no memory.

    Raises:
        ConversionError: if there are no weights in safetensors format, or a file is damaged.
        OSError: if a file cannot be read.
    """
    import json

    from safetensors import SafetensorError, safe_open

    names = [WEIGHTS]
    if not (directory / WEIGHTS).is_file():
        if not (directory / INDEX).is_file():
            raise ConversionError(_no_weights(directory), remedy=_as_safetensors(directory))
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        names = sorted(set(index["weight_map"].values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ConversionError(
            f"model.teacher: {directory} lacks {shown(missing)}, which {INDEX} lists",
            remedy="copy the directory again, whole",
        )
    shapes: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(directory / name, framework="pt") as file:
                for key in file.offset_keys():
                    shapes[key] = torch.zeros(()).expand(file.get_slice(key).get_shape())
        except SafetensorError as error:
            raise _damaged(directory / name, error) from error
    return shapes


def refuse_not_finite(model: Any, source: str) -> None:
    """Refuse weights that are NaN or infinite, of which training makes nothing.

    Args:
        model: with its weights loaded.
        source: the start model, for the message.

    Raises:
        ConversionError: naming them.
    """
    names = [name for name, one in model.named_parameters() if not one.isfinite().all()]
    if names:
        raise ConversionError(
            f"model.teacher: weights of {source!r} hold NaN or infinity: {shown(names)}",
            remedy="take an earlier checkpoint: the training that wrote this one had failed",
        )


def compare_weights(
    model: Any,
    info: Mapping[str, Any],
    source: str,
    architectures: Sequence[str] = (),
    *,
    kind: TaskKind | None = None,
) -> TakenOver:
    """See that a model has taken its whole body over from a file.

    Args:
        model: what transformers made.
        info: its loading info.
        source: the start model, for messages.
        architectures: the classes that its configuration names.
        kind: of the task, which says what a head is; classification if None.

    Returns:
        What is new, replaced and dropped of the head.

    Raises:
        ConversionError: if a weight of the body is missing, left over or of another shape, or the
            head came in part.
    """
    missing = set(info["missing_keys"])
    shapes = {name: (tuple(old), tuple(new)) for name, old, new in info["mismatched_keys"]}
    extra = {name for name in info["unexpected_keys"] if not _NO_WEIGHTS.search(name)}
    spec = known_family(model)
    kind = kind or TASK_KINDS["classification"]
    classifier = spec.task_head if spec is not None and spec.task_head else "classifier"
    names = set(model.state_dict())
    last = kind.own_head(classifier)
    if last and not any(name.startswith(f"{last}.") for name in names):
        # A few families give all their heads one name.
        last = classifier
    own_head = {name for name in names if last and name.startswith(f"{last}.")}
    # Where a head has the parts of the body beside it, it is one of the model's own parts, too.
    head = own_head | {name for name in names if not _is_body(model, name)}
    lacks_head = not own_head.isdisjoint(missing | shapes.keys())
    other_names = tuple(name for name in _SAME_NAMES if not kind.auto_class.endswith(name))
    others = [one for one in architectures if last and one.endswith(other_names)]
    other_head = others[0] if others and not lacks_head else ""
    is_new = lacks_head or bool(other_head)
    # What feeds the last layer may be new where that layer is; below a trained one it may not.
    may_lack = {name for name in head if is_new}
    bad_missing = (missing - may_lack) | _halves(model, missing)
    resized = {name for name, (old, new) in shapes.items() if old[1:] == new[1:]} & own_head
    bad_shapes = {name: found for name, found in shapes.items() if name not in resized}
    wrapped = {name for name in extra if any(name.endswith(f".{one}") for one in missing)}
    bad_extra = {name for name in extra if _is_body(model, name)} | wrapped
    if bad_missing or bad_shapes or bad_extra:
        raise _refusal(source, bad_missing, bad_extra, bad_shapes, all_extra=extra)
    return TakenOver(
        tuple(sorted(missing)),
        tuple(sorted(resized)),
        tuple(sorted(extra)),
        has_head=not is_new,
        other_head=other_head,
    )


def shown(names: Iterable[str], limit: int = _SHOWN) -> str:
    """List a few names, and how many more there are, in one line."""
    known = sorted(names)
    more = f" and {len(known) - limit} more" if len(known) > limit else ""
    return f"{', '.join(known[:limit])}{more}"


def _is_body(model: Any, name: str) -> bool:
    """Whether a weight belongs to what all tasks share; a pooler is part of the head."""
    prefix = model.base_model_prefix
    inner = name.removeprefix(f"{prefix}.")
    if inner.startswith("pooler."):
        return False
    first = inner.split(".")[0]
    return name != inner or first in dict(model.base_model.named_children())


def _halves(model: Any, missing: Collection[str]) -> set[str]:
    """Weights that are missing although others of the same layer are there."""
    parents = Counter(name.rpartition(".")[0] for name in model.state_dict())
    lacking = Counter(name.rpartition(".")[0] for name in missing)
    return {
        name
        for name in missing
        if lacking[name.rpartition(".")[0]] < parents[name.rpartition(".")[0]]
    }


def _refusal(
    source: str,
    missing: Collection[str],
    extra: Collection[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    all_extra: Collection[str],
) -> ConversionError:
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({shown(missing)})")
    if extra:
        parts.append(f"{len(extra)} left over ({shown(extra)})")
    if shapes:
        differing = [
            f"{name}: {list(old)} in the file, {list(new)} by config.json"
            for name, (old, new) in shapes.items()
        ]
        parts.append(f"{len(shapes)} of another shape ({shown(differing)})")
    cause, remedy = _likely_cause(missing, all_extra)
    return ConversionError(
        f"model.teacher: the weights of {source!r} do not fit its config.json, and only a new head "
        f"may differ: {'; '.join(parts)}{cause}",
        remedy=remedy,
    )


def _likely_cause(missing: Collection[str], extra: Collection[str]) -> tuple[str, str]:
    if any(".lora_" in name or ".base_layer." in name for name in extra):
        return (
            ". The file holds adapters beside the weights",
            "merge them first: model.merge_and_unload().save_pretrained(DIRECTORY)",
        )
    # A checkpoint of the body alone has its names without the classifier's own prefix.
    bare = {*missing, *(name.partition(".")[2] for name in missing)} - {""}
    prefixes = Counter(prefix for name in extra for prefix in _prefixes(name, bare))
    if prefixes:
        prefix, count = prefixes.most_common(1)[0]
        if 2 * count >= len(extra):
            known = [text for start, text in _WRAPPERS.items() if prefix.startswith(start)]
            origin = f", as {known[0]} leaves it" if known else ""
            return (
                f". The names begin with {prefix!r}{origin}",
                f"take {prefix!r} off the names in {WEIGHTS}, or save the inner model: "
                f"model.{prefix.rstrip('.')}.save_pretrained(DIRECTORY)",
            )
    return (
        "",
        "give config.json and weights of the same model, as one save_pretrained wrote them",
    )


def _prefixes(name: str, endings: Collection[str]) -> list[str]:
    """The shortest starts of a name after which one of the endings follows."""
    parts = name.split(".")
    for cut in range(1, len(parts)):
        if ".".join(parts[cut:]) in endings:
            return [f"{'.'.join(parts[:cut])}."]
    return []


def _no_weights(directory: Path) -> str:
    others = [path.name for path in _others(directory)]
    only = f", only {shown(others)}" if others else ""
    return f"model.teacher: the directory '{directory}' holds no {WEIGHTS}{only}"


def _damaged(path: Path, error: Exception) -> ConversionError:
    with path.open("rb") as file:
        foreign = foreign_format(file.read(_HEAD_BYTES))
    if foreign is not None:
        return ConversionError(f"model.teacher: {path} is {foreign[0]}", remedy=foreign[1])
    return ConversionError(
        f"model.teacher: {path} is damaged: {error}", remedy="copy or download the file again"
    )


def _as_safetensors(directory: Path) -> str:
    if _others(directory):
        return (
            "convert it where you trust its origin: load it with transformers and call "
            f"save_pretrained, which writes {WEIGHTS}; moe-dist reads no other format, and a "
            "pickle can run any code"
        )
    return f"give a directory that save_pretrained wrote whole, with {WEIGHTS}"


def _others(directory: Path) -> list[Path]:
    return sorted(
        path for path in directory.iterdir() if path.suffix in _OTHER_FORMATS and path.is_file()
    )
