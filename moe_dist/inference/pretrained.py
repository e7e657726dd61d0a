"""A pre-trained model as the start of a task's teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moe_dist.conversion.families import find_stacks, known_family
from moe_dist.conversion.heads import KEY as TASK_HEADS
from moe_dist.conversion.heads import task_head
from moe_dist.errors import ConversionError
from moe_dist.inference.sentence_directory import MODULES, read_sentence_pooling
from moe_dist.inference.silence import quiet_transformers
from moe_dist.inference.skeleton import (
    UNTRUSTED,
    clear_errors,
    constructor_arguments,
    model_class_for,
)
from moe_dist.inference.start_head import HeadUse, match_head, own_names, put_in_order
from moe_dist.inference.start_tokenizer import fit_tokenizer, read_tokenizer
from moe_dist.inference.start_weights import compare_weights, read_shapes, refuse_not_finite
from moe_dist.tasks import TaskKind, head_kind

_NEW_HEAD_STD = 0.02
_VECTOR_KEYS = ("pooling", "normalise")


@dataclass(frozen=True)
class StartModel:
    """A start model as a task takes it over.

    Args:
        model: in float32 and training mode.
        tokenizer: fits it.
        notes: what is new, left out or put in order, a line each.
        warnings: what was guessed, a line each.
        is_whole: whether nothing of it is new, so that it could be taken as it is.
    """

    model: Any
    tokenizer: Any
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    is_whole: bool


def load_pretrained(
    source: str,
    *,
    num_labels: int,
    label_names: Sequence[str] | None = None,
    kind: TaskKind | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    revision: str | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Load a model for a task, and its tokenizer.

    A head that belongs to the task is drawn from the seed where the source has none of this size;
    one that it has answers in the task's order of classes.

    Args:
        source: a directory, or a name on the Hugging Face hub.
        num_labels: outputs of the head; 1 with no label names means regression.
        label_names: class names in the order of their ids; None where the task has none.
        kind: of the task; by default a sequence classifier's, by the label names.
        options: of the task.
        revision: hub commit, tag or branch.
        seed: of the head's weights.

    Returns:
        The model in float32 and training mode, and the tokenizer, which has a pad token.

    Raises:
        ConversionError: if there is no such model, it cannot be read, or its weights or tokenizer
            do not fit its configuration.
    """
    asked = _Asked(kind or head_kind(label_names), num_labels, label_names, options)
    start = _load(source, asked, revision, seed)
    return start.model, start.tokenizer


def check_pretrained(
    directory: str,
    *,
    num_labels: int,
    label_names: Sequence[str] | None = None,
    kind: TaskKind | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> StartModel:
    """See that `load_pretrained` will take a model over, without reading its weights.

    Arguments and errors are its own; the model returned has weights of no meaning.
    """
    asked = _Asked(kind or head_kind(label_names), num_labels, label_names, options)
    with clear_errors(directory):
        shapes = read_shapes(Path(directory))
    with torch.random.fork_rng(devices=[]):
        return _load(directory, asked, None, 0, shapes=shapes)


@dataclass(frozen=True)
class _Asked:
    """What a task asks of a model."""

    kind: TaskKind
    num_labels: int
    label_names: Sequence[str] | None
    options: Mapping[str, Any]

    @property
    def names(self) -> list[str] | None:
        return None if self.label_names is None else list(map(str, self.label_names))


def _load(
    source: str,
    asked: _Asked,
    revision: str | None,
    seed: int,
    *,
    shapes: dict[str, torch.Tensor] | None = None,
) -> StartModel:
    names, num_labels = asked.names, asked.num_labels
    if names is not None and len(names) != num_labels:
        raise ConversionError(f"{num_labels} labels but {len(names)} label names")
    with clear_errors(source), quiet_transformers():
        asked, said = _with_pooling(source, asked)
        config, entries = _configure(source, asked, revision)
        torch.manual_seed(seed)
        model, info = _build(source, asked.kind, config, revision, shapes)
    taken = compare_weights(
        model, info, source, entries.get("architectures") or (), kind=asked.kind
    )
    if shapes is None:
        refuse_not_finite(model, source)
    _refuse_first_of_decoder(model, asked, source)
    notes = [*said, *taken.lines()]
    warnings: list[str] = []
    in_place = HeadUse(tuple(range(num_labels)))
    use = HeadUse(None) if taken.other_head and num_labels else in_place
    if taken.has_head and names is not None:
        own, contradiction = own_names(entries, num_labels)
        use = match_head(own, names)
        (warnings if use.is_guess else notes).extend([use.line] if use.line else [])
        warnings += [contradiction] if contradiction else []
    if use.rows != in_place.rows and shapes is None:
        std = getattr(config, "initializer_range", None) or _NEW_HEAD_STD
        put_in_order(task_head(model), use, std=std, seed=seed)
    tokenizer = read_tokenizer(source, revision)
    warnings += fit_tokenizer(tokenizer, model)
    if asked.kind.pads_right and tokenizer.padding_side != "right":
        tokenizer.padding_side = "right"
        notes.append("its tokenizer pads on the left; this task's samples are padded on the right")
    notes += asked.kind.check_model(model, tokenizer, asked.options)
    is_whole = use.rows is not None and not (taken.new or taken.replaced)
    return StartModel(model.train(), tokenizer, tuple(notes), tuple(warnings), is_whole)


def _with_pooling(source: str, asked: _Asked) -> tuple[_Asked, list[str]]:
    """Let a start model say how it makes vectors, where its task is about them; in a line too.

    A recipe that says something else is a ConversionError.
    """
    if "pooling" not in asked.kind.option_names:
        return asked, []
    found, assumed = read_sentence_pooling(source)
    options = dict(asked.options)
    for key in _VECTOR_KEYS:
        own, given = getattr(found, key), options.get(key)
        if not assumed and given not in (None, own):
            raise ConversionError(
                f"data.{key}={_plain(given)} contradicts the sentence-transformers files of "
                f"{source!r}, which say {_plain(own)}",
                remedy=f"remove data.{key}; or remove {MODULES} beside the model, to start from "
                "its transformer alone",
            )
        options[key] = own if given is None else given
    options["max_seq_length"] = found.max_seq_length
    length = "of length 1" if options["normalise"] else "as long as they are"
    vectors = f"vectors are the {options['pooling']} of a text's last hidden states, {length}"
    origin = "as its sentence-transformers files say"
    if assumed:
        keys = [f"data.{key}" for key in _VECTOR_KEYS if asked.options.get(key) is not None]
        origin = f"by {' and '.join(keys)}" if keys else "since nothing says how they are made"
    return replace(asked, options=options), [f"{vectors}, {origin}"]


def _refuse_first_of_decoder(model: Any, asked: _Asked, source: str) -> None:
    """See that the first token, where it is a text's vector, sees the others."""
    spec = known_family(model)
    if asked.options.get("pooling") != "cls" or spec is None:
        return
    if any(is_causal for _, is_causal in find_stacks(model, spec)):
        raise ConversionError(
            f"data.pooling=cls takes the first token for a text's vector, and in the decoder "
            f"{source!r} that token sees no other",
            remedy="set data.pooling to mean or max",
        )


def _plain(value: Any) -> str:
    return str(value).lower()


def _configure(source: str, asked: _Asked, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """The configuration for the task, and the entries of config.json as they stand there."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision, **UNTRUSTED)
    entries, _ = config.get_config_dict(source, revision=revision)
    for key, value in asked.kind.model_settings(asked.names, asked.options).items():
        setattr(config, key, value)
    if hasattr(config, TASK_HEADS):
        # Heads of several tasks, as rows of one layer: another task makes its own.
        delattr(config, TASK_HEADS)
    return config, entries


def _build(
    source: str,
    kind: TaskKind,
    config: Any,
    revision: str | None,
    shapes: dict[str, torch.Tensor] | None,
) -> tuple[Any, dict[str, Any]]:
    """The model and its loading info; of `shapes`, where they are given, in place of files."""
    auto = model_class_for(kind, config, source)
    model_class = auto._model_mapping[type(config)]
    options: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
        "key_mapping": _renamed_prefix(model_class, config),
        **constructor_arguments(kind, auto, config),
    }
    found: tuple[Any, dict[str, Any]]
    if shapes is None:
        found = auto.from_pretrained(
            source,
            revision=revision,
            # Without it transformers would read a pickle where there is nothing else.
            use_safetensors=True,
            **options,
            **UNTRUSTED,
        )
    else:
        found = model_class.from_pretrained(None, state_dict=shapes, **options)
    if options["key_mapping"]:
        # Else it would be saved under the names that the file had.
        found[0]._weight_conversions = None
    return found


def _renamed_prefix(model_class: Any, config: Any) -> dict[str, str] | None:
    """Say how the body is called in files of the family's other classes, where that differs.

    Llama's model for questions calls it `transformer`, and all its others `model`.
    """
    from transformers import AutoModel

    own = model_class.base_model_prefix
    body = AutoModel._model_mapping.get(type(config), None)
    usual = getattr(body, "base_model_prefix", own)
    # Twice the same prefix is a wrapper's, which is refused by its name.
    return None if usual == own else {rf"^{usual}\.(?!{usual}\.)": f"{own}."}
