"""Turn a language model in a GGUF file into a plain directory for `from_pretrained`."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

GGUF_READERS = ("gguf", "accelerate")
"""What transformers reads GGUF with."""

_SPLIT_DIGITS = ("smollm",)
"""GGUF's names of the tokenizers that make each digit a token of its own."""

_HOW_IT_WAS_READ = ("is_local", "local_files_only")
"""What transformers would save of this machine, so that two would hold different files."""


def dequantise(file: Path, folder: Path) -> None:
    """Write a GGUF file's model in float32, its tokenizer and its settings into a folder.

    Values of 4 bits are a half-precision scale times a small number plus a half-precision offset,
    which neither float16 nor bfloat16 holds: float32 keeps what the file says.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # What is drawn for parameters, and then replaced, must not move the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
        config = model.config
        # transformers saves no model that was loaded as a quantized one, so another one is made.
        del config.quantization_config
        config._name_or_path = ""
        with torch.device("meta"):
            plain = type(model)(config)
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = model.generation_config
        plain.save_pretrained(folder)
        tokenizer = _read_tokenizer(file, config.max_position_embeddings)
        tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        # safetensors writes a file that nobody else may read, whatever the umask says.
        path.chmod(stat.S_IMODE((folder / "config.json").stat().st_mode))


def _read_tokenizer(file: Path, max_length: int) -> Any:
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = max_length
    for key in _HOW_IT_WAS_READ:
        tokenizer.init_kwargs.pop(key, None)
    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in _SPLIT_DIGITS:
        # transformers does not look at this entry: blanks before a digit would be other tokens
        # than the model was trained with.
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer
