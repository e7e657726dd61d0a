"""What sentence-transformers keeps beside a model: how the states of tokens become a text's vector.

Its directories are read, and written, as files: the library itself is not needed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor
from torch.nn import functional

from moe_dist.errors import ConversionError
from moe_dist.losses.alignment import POOLINGS

MODULES = "modules.json"
_TRANSFORMER_SETTINGS = "sentence_bert_config.json"
_LIBRARY_SETTINGS = "config_sentence_transformers.json"
POOLING, NORMALISED = "sentence_pooling", "sentence_normalised"
MAX_LENGTH = "sentence_max_length"
"""With those above, the entries of a model's configuration."""

# As sentence-transformers before 6.0 writes it, and every version since reads it.
_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_CHAINS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_SAVE_AGAIN = "save it again with SentenceTransformer(DIRECTORY).save(DIRECTORY)"


@dataclass(frozen=True)
class SentencePooling:
    """How the states of a text's tokens become its vector.

    Args:
        pooling: a key of `POOLINGS`.
        normalise: whether vectors are brought to length 1.
        max_seq_length: tokens after which a text is cut; None leaves it to the tokenizer.
    """

    pooling: str = "mean"
    normalise: bool = True
    max_seq_length: int | None = None

    @classmethod
    def of(cls, config: Any) -> SentencePooling | None:
        """Read it from a model's configuration; None where that says nothing of it."""
        pooling = getattr(config, POOLING, None)
        if pooling is None:
            return None
        return cls(
            pooling, bool(getattr(config, NORMALISED, False)), getattr(config, MAX_LENGTH, None)
        )

    def vectors(self, hidden_BSD: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Pool the last hidden states of a batch: (B, D) float32."""
        vectors_BD = POOLINGS[self.pooling](hidden_BSD, mask_BS)
        return functional.normalize(vectors_BD) if self.normalise else vectors_BD


def read_sentence_pooling(directory: Path | str) -> tuple[SentencePooling, tuple[str, ...]]:
    """Read how a model's directory makes vectors of texts.

    Args:
        directory: of a model, with or without the files of sentence-transformers.

    Returns:
        What they say, and what was assumed, a line each.

    Raises:
        ConversionError: if they are damaged, or ask for what moe-dist does not do.
    """
    source = Path(directory)
    if not (source / MODULES).exists():
        assumed = "the mean over a text's tokens, brought to length 1, is assumed"
        return SentencePooling(), (f"no {MODULES} says how vectors are made: {assumed}",)
    parts = dict(_modules(source))
    return (
        SentencePooling(
            pooling=_pooling(source, parts["Pooling"]),
            normalise="Normalize" in parts,
            max_seq_length=_max_seq_length(source),
        ),
        (),
    )


def write_sentence_files(pooling: SentencePooling, directory: Path, width: int) -> None:
    """Put beside a model what lets sentence-transformers load its directory.

    Args:
        pooling: how its vectors are made.
        directory: the model's.
        width: of its hidden states.
    """
    chain = _CHAINS[pooling.normalise]
    places = ["", *(f"{number}_{name}" for number, name in enumerate(chain) if number)]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": place,
            "type": f"sentence_transformers.models.{name}",
        }
        for number, (name, place) in enumerate(zip(chain, places, strict=True))
    ]
    _write(directory / MODULES, modules)
    flags = {flag: mode == pooling.pooling for mode, flag in _FLAGS.items()}
    (directory / places[1]).mkdir()
    _write(directory / places[1] / "config.json", {"word_embedding_dimension": width, **flags})
    settings: dict[str, Any] = {"do_lower_case": False}
    if pooling.max_seq_length is not None:
        settings["max_seq_length"] = pooling.max_seq_length
    _write(directory / _TRANSFORMER_SETTINGS, settings)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _modules(source: Path) -> Iterator[tuple[str, Path]]:
    """Name each module and where its settings are, if there are no others than we have."""
    entries = _read(source / MODULES, list)
    try:
        found = [(str(entry["type"]).rpartition(".")[2], str(entry["path"])) for entry in entries]
    except (LookupError, TypeError) as error:
        raise _damaged(source / MODULES, repr(error)) from error
    names = [name for name, _ in found]
    strange = [name for name in names if name not in _CHAINS[True]]
    if strange:
        raise _refused(source, f"has a module {strange[0]}, which moe-dist does not have")
    if names not in _CHAINS:
        raise _refused(source, f"joins its modules as {', '.join(names)}")
    for name, place in found:
        path = PurePosixPath(place)
        if path.is_absolute() or ".." in path.parts:
            raise _damaged(source / MODULES, f"the path {place!r} leads out of the directory")
        yield name, source / path
    if found[0][1]:
        raise ConversionError(
            f"model.teacher: {source} keeps its transformer in {found[0][1]!r}, not beside "
            f"{MODULES}",
            remedy=_SAVE_AGAIN,
        )


def _pooling(source: Path, place: Path) -> str:
    settings = _read(place / "config.json", dict)
    modes = settings.get("pooling_mode") or [
        mode for mode, key in _FLAGS.items() if settings.get(key)
    ]
    modes = [modes] if isinstance(modes, str) else modes or ["mean"]
    if len(modes) > 1:
        raise _refused(source, f"joins several poolings ({', '.join(map(str, modes))})")
    if modes[0] not in POOLINGS:
        raise _refused(source, f"pools by {modes[0]}, which moe-dist does not do")
    return str(modes[0])


def _max_seq_length(source: Path) -> int | None:
    """How long texts may be; what else would change texts or states is refused."""
    # Older versions name the file after the family.
    files = sorted(source.glob("sentence_*_config.json"))
    settings = _read(files[0], dict) if files else {}
    length = settings.get("max_seq_length")
    if length is not None and not (isinstance(length, int) and length > 0):
        raise _damaged(files[0], f"max_seq_length is {length!r}")
    for key, usual in (("transformer_task", "feature-extraction"), ("unpad_inputs", None)):
        if settings.get(key, usual) != usual:
            raise _refused(source, f"sets {key} to {settings[key]!r}")
    texts = settings.get("modality_config", {}).get("text", {})
    if texts.get("method_output_name", "last_hidden_state") != "last_hidden_state":
        raise _refused(source, f"pools {texts['method_output_name']!r}, and no last hidden states")
    own = source / "tokenizer_config.json"
    lowers = own.exists() and _read(own, dict).get("do_lower_case")
    if settings.get("do_lower_case") and not lowers:
        raise _refused(source, "brings texts to lower case, which its tokenizer does not")
    _refuse_prompts(source)
    return length


def _refuse_prompts(source: Path) -> None:
    path = source / _LIBRARY_SETTINGS
    settings = _read(path, dict) if path.exists() else {}
    name = settings.get("default_prompt_name")
    prompts = settings.get("prompts")
    prompt = prompts.get(name) if isinstance(prompts, Mapping) else None
    if prompt:
        raise _refused(source, f"puts the prompt {prompt!r} before every text")


def _read(path: Path, kind: Callable[..., Any]) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if type(content) is not kind:
        raise _damaged(path, f"it holds no {kind.__name__}")
    return content


def _damaged(path: Path, why: str) -> ConversionError:
    return ConversionError(
        f"model.teacher: {path} cannot be read: {why}",
        remedy="copy the directory again from its source, or " + _SAVE_AGAIN,
    )


def _refused(source: Path, what: str) -> ConversionError:
    able = f"the mean, the maximum or the first token ({', '.join(POOLINGS)})"
    return ConversionError(
        f"model.teacher: the sentence-transformers model in {source} {what}",
        remedy=f"choose one that pools its last hidden states by {able}, with or without "
        f"Normalize; or remove {MODULES} to start from its transformer alone",
    )
