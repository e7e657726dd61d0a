from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from moe_dist.data.gguf_model import dequantise

WIDTH, HEADS, VOCABULARY = 64, 2, 263
SPECIAL = ("<unk>", "<start>", "<end>")
CHAT = "{% for message in messages %}{{ message['content'] }}<end>{% endfor %}"


def byte_tokens() -> list[str]:
    """The 256 bytes as GPT-2's tokenizers write them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer in 4 bits, with a tokenizer that splits digits."""
    import numpy as np

    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_block_count(1)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    merges = ["Ġ Ġ", "Ċ Ċ", "a b", "Ġ ab"]
    words = [merge.replace(" ", "") for merge in merges]
    writer.add_token_list([*SPECIAL, *byte_tokens(), *words])
    writer.add_token_types([3] * len(SPECIAL) + [1] * (256 + len(words)))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (VOCABULARY, WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // HEADS, WIDTH),
        "blk.0.attn_v": (WIDTH // HEADS, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (WIDTH, WIDTH),
        "blk.0.ffn_up": (WIDTH, WIDTH),
        "blk.0.ffn_down": (WIDTH, WIDTH),
    }
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        values = random.normal(size=shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target: Path = tmp_path_factory.mktemp("plain")
    dequantise(file, target)
    return target


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def test_weights_are_the_files_own(file: Path, folder: Path) -> None:
    plain = load(folder)
    assert not hasattr(plain.config, "quantization_config")
    # A plain directory can be saved again, as a quantized model cannot.
    plain.save_pretrained(folder / "again")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    ffn = plain.model.layers[0].mlp
    for name, weight in (
        ("token_embd.weight", plain.model.embed_tokens.weight),
        ("blk.0.ffn_gate.weight", ffn.gate_proj.weight),
        ("blk.0.ffn_up.weight", ffn.up_proj.weight),
        ("blk.0.ffn_down.weight", ffn.down_proj.weight),
    ):
        values = gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)
        assert torch.equal(weight, torch.from_numpy(values.copy())), name
    # Neither half type would have kept them.
    for dtype in (torch.float16, torch.bfloat16):
        assert not torch.equal(ffn.up_proj.weight.to(dtype).float(), ffn.up_proj.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        expected = load(file.parent, gguf_file=file.name)(ids).logits
        assert torch.equal(plain(ids).logits, expected)


def test_only_one_place_holds_tied_embeddings(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118, it is no dictionary
    plain = load(folder)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight


def test_tokenizer_and_settings_are_kept(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("ab  12\n\n3 ab", "naïve 漢字 \U0001f600 ", " x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<start>",
        "<end>",
        "<end>",
    )
    assert tokenizer.model_max_length == 32
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi<end>"
    config = load(folder).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)


def test_blanks_before_digits_stay_whole(folder: Path) -> None:
    """As in the original, which splits digits off before it looks at blanks."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("\n\n1") == ["ĊĊ", "1"]


def test_nothing_of_this_machine_and_no_random_number(file: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    dequantise(file, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
    assert "local" not in (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    for path in tmp_path.glob("*.json"):
        assert str(file.parent) not in path.read_text(encoding="utf-8"), path.name
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path.name
