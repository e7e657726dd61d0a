"""A model as a directory: written whole or not at all, and checked when it is read.

Dense and converted models alike. The directory is one that transformers reads, plus
``manifest.json`` with the SHA-256 of every file and every expert.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from moe_dist.conversion.absent import absent_modules, leave_out
from moe_dist.conversion.heads import choose_task, install_heads
from moe_dist.digests import PICKLES, file_digest
from moe_dist.errors import CheckpointError, is_full_disk
from moe_dist.inference.sentence_directory import SentencePooling, write_sentence_files
from moe_dist.inference.silence import quiet_transformers
from moe_dist.moe.digests import expert_digests, numbered
from moe_dist.moe.layer import MoELayer
from moe_dist.uris import is_uri
from moe_dist.whole_files import whole_directory

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def save_model(model: Any, directory: Path | str, tokenizer: Any = None) -> Path:
    """Write a model, and its tokenizer, so that `load_model` and transformers can read it.

    The files are written beside the directory and moved there when all are complete; what was
    there before is replaced. A model without a head whose configuration says how vectors are made
    of its states (`SentencePooling`) is one that sentence-transformers loads as well.

    Args:
        model: a transformers model, dense or converted, with all of its experts.
        directory: where; parents are made.
        tokenizer: a transformers tokenizer to put beside it.

    Returns:
        The directory, absolute.

    Raises:
        CheckpointError: if it cannot be written.
    """
    target = Path(directory).absolute()
    with model_directory(target) as unfinished:
        write_model(model, unfinished, tokenizer)
    return target


def write_model(model: Any, directory: Path, tokenizer: Any = None) -> None:
    """Write what `save_model` writes into a directory of `model_directory`."""
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size="1000GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    _name_outputs(model, directory / "config.json")
    pooling = SentencePooling.of(model.config)
    if pooling is not None and model.base_model is model:
        write_sentence_files(pooling, directory, model.config.hidden_size)
    write_manifest(
        directory,
        {
            "format_version": FORMAT_VERSION,
            "absent": _absent(model),
            "experts": numbered(_expert_digests(model)),
        },
    )


@contextmanager
def model_directory(target: Path) -> Iterator[Path]:
    """Where to write a model that takes its place when it is whole.

    What is there already is replaced; a CheckpointError if it cannot be written.
    """
    try:
        with whole_directory(target) as unfinished:
            yield unfinished
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write the model to {target}: {error}",
            remedy="free space there, or write elsewhere"
            if is_full_disk(error)
            else "check the path and its permissions",
        ) from error


def write_manifest(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write what is true of a model, and the digest of each of its files, beside these."""
    files = {name: _file_entry(directory / name) for name in _file_names(directory)}
    text = json.dumps({**facts, "files": files}, indent=1, sort_keys=True)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load_model(
    directory: Path | str,
    device: torch.device | str | None = None,
    *,
    task: str | None = None,
) -> Any:
    """Read a model that `save_model` wrote, after checking every file.

    Args:
        directory: where it is; a URI such as `s3://bucket/model` is downloaded for the moment.
        device: where the weights go; the CPU by default.
        task: of a model of several tasks the one to answer; without it a forward call must be
            inside `moe_dist.moe.routing.use_task`.

    Returns:
        The model, in eval mode.

    Raises:
        CheckpointError: if a file is damaged (the message names it), missing, a pickle, or does
            not fit the model.
        MissingInputError: if the model has no such task.
    """
    if is_uri(directory):
        from moe_dist.storage import local_copy

        with local_copy(str(directory)) as local:
            return load_model(local, device, task=task)
    source = Path(directory).absolute()
    verify_model(source)
    kind = _class_named_in(source)
    absent = json.loads((source / MANIFEST).read_text(encoding="utf-8")).get("absent", [])
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                source, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{source} does not hold a {kind.__name__}: {error}",
            remedy="save the model again with save_model",
        ) from error
    leave_out(model, absent)
    lacking = tuple(f"{name}." for name in absent)
    info["missing_keys"] = {name for name in info["missing_keys"] if not name.startswith(lacking)}
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[fault]:
            raise CheckpointError(
                f"{source / 'model.safetensors'} does not fit config.json: {fault} "
                f"{sorted(map(str, info[fault]))[:5]}",
                remedy="save the model again with save_model",
            )
    install_heads(model)
    if task is not None:
        choose_task(model, task)
    return model.to(device or "cpu").eval()


def load_tokenizer(directory: Path | str) -> Any:
    """Read the tokenizer saved with a model, from a directory or URI; none is a CheckpointError."""
    from transformers import AutoTokenizer

    if is_uri(directory):
        from moe_dist.storage import local_copy

        with local_copy(str(directory)) as local:
            return load_tokenizer(local)
    source = Path(directory).absolute()
    if not (source / "tokenizer_config.json").is_file():
        raise CheckpointError(
            f"{source} holds no tokenizer",
            remedy="save the model again with save_model(model, directory, tokenizer)",
        )
    with quiet_transformers():
        return AutoTokenizer.from_pretrained(source, local_files_only=True)


def verify_model(directory: Path | str) -> None:
    """Check every file of a model directory against its manifest.

    A CheckpointError names the file that is damaged, missing, or not allowed.
    """
    source = Path(directory).absolute()
    again = "copy the directory again from its source, or save the model again"
    if not source.is_dir():
        raise CheckpointError(f"{source} is not a directory", remedy="give a model directory")
    entries = _read_manifest(source)
    for name in _file_names(source):
        suffix = Path(name).suffix.lower()
        if suffix in PICKLES:
            raise CheckpointError(
                f"{source / name} is a pickle, which can run any code when it is read",
                remedy="remove it; models are read from safetensors only",
            )
        if suffix == ".safetensors" and name not in entries:
            raise CheckpointError(
                f"{source / name} is not in the manifest", remedy=f"remove it, or {again}"
            )
    for name, entry in entries.items():
        path = source / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", remedy=again)
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: {size} bytes instead of {entry['bytes']}", remedy=again
            )
        if file_digest(path) != entry["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is another", remedy=again)


def _expert_digests(model: nn.Module) -> dict[str, list[str]]:
    return {
        module.name: expert_digests(dict(module.experts.named_parameters()))
        for module in model.modules()
        if isinstance(module, MoELayer)
    }


def _absent(model: nn.Module) -> list[str]:
    """Modules that a dense model was built without; a converted one's configuration knows."""
    if hasattr(model.config, "moe"):
        return []
    with torch.device("meta"):
        return absent_modules(model, type(model)(model.config))


def _name_outputs(model: Any, path: Path) -> None:
    """Write the names of outputs where transformers takes them for defaults and leaves them out.

    Its default is two outputs, and BART's three: without names a BART of two would come back with
    three.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    if "id2label" not in config and "ForSequenceClassification" in type(model).__name__:
        names = {str(number): name for number, name in model.config.id2label.items()}
        config |= {"id2label": names, "label2id": model.config.label2id}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _class_named_in(source: Path) -> Any:
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        name = str(config["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"{source / 'config.json'} does not name the model's class: {error!r}",
            remedy="save the model again with save_model",
        ) from error
    if name.startswith("Moe") and str(config.get("model_type", "")).startswith("moe_"):
        from moe_dist.conversion.modeling import model_class

        return model_class(name)
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise CheckpointError(
            f"{source / 'config.json'} names the class {name}, which transformers does not have",
            remedy="install the transformers version that the model was saved with",
        )
    return kind


def _read_manifest(source: Path) -> dict[str, dict[str, Any]]:
    path = source / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        entries = {
            name: {"sha256": str(entry["sha256"]), "bytes": int(entry["bytes"])}
            for name, entry in manifest["files"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is missing or damaged: {error!r}",
            remedy="give a directory that save_model wrote, or save the model again",
        ) from error
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, and this moe-dist reads format {FORMAT_VERSION}",
            remedy="use the moe-dist version that wrote it",
        )
    outside = [name for name in entries if Path(name).is_absolute() or ".." in Path(name).parts]
    if outside or "config.json" not in entries or "model.safetensors" not in entries:
        raise CheckpointError(
            f"{path} does not list a model's files", remedy="save the model again with save_model"
        )
    return entries


def _file_names(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )


def _file_entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}
