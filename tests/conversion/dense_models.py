"""Tiny random models of every family, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 50
NUM_NEURONS = 32
LLAMA_KIN = ("llama", "mistral", "qwen2", "qwen3")
FAMILY_NAMES = ("bert", "gpt2", "t5", "t5-gated", "bart", "llama", "qwen2")


def tiny_model(family: str, kind: str = "", **changes: Any) -> Any:
    """Build a model whose weights and biases are large enough for errors to show.

    `kind` names another head than the family's usual one, such as ForTokenClassification.
    """
    torch.manual_seed(0)
    model = _build(family, kind, changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower() and "ln_" not in name:
                parameter.normal_(std=0.25)
    return model.eval()


def token_batch(num_samples: int = 4, length: int = 7, seed: int = 1) -> dict[str, Tensor]:
    """Random token ids, padded to different lengths on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (num_samples, length), generator=generator)
    lengths = torch.randint(2, length + 1, (num_samples,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def model_inputs(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add what an encoder-decoder needs to give logits."""
    if model.config.is_encoder_decoder and "labels" not in batch:
        return batch | {"labels": batch["input_ids"]}
    return batch


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Run a model without gradient."""
    with torch.no_grad():
        logits: Tensor = model(**model_inputs(model, batch)).logits
    return logits


def random_scores(model: Any, seed: int = 0) -> list[Tensor]:
    """Scores in the shapes that the model's FFNs have."""
    from moe_dist.conversion.families import find_slots

    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(slot.num_neurons, generator=generator) for slot in find_slots(model)]


def _build(family: str, kind: str, changes: dict[str, Any]) -> Any:
    import transformers as hf

    if family == "bert":
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": NUM_NEURONS,
            "max_position_embeddings": 24,
        }
        config: Any = hf.BertConfig(vocab_size=VOCAB_SIZE, **(sizes | changes))
        return hf.BertForSequenceClassification(config)
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": NUM_NEURONS}
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = hf.GPT2Config(vocab_size=VOCAB_SIZE, n_positions=24, **(sizes | ids | changes))
        return hf.GPT2LMHeadModel(config)
    if family in ("t5", "t5-gated"):
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": NUM_NEURONS, "num_layers": 2, "num_heads": 2}
        gated = family == "t5-gated"
        config = hf.T5Config(
            vocab_size=VOCAB_SIZE,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated,
            **(sizes | changes),
        )
        return hf.T5ForConditionalGeneration(config)
    if family in LLAMA_KIN:
        sizes = {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": NUM_NEURONS,
            "max_position_embeddings": 24,
        }
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        name = family.capitalize()
        config = getattr(hf, f"{name}Config")(vocab_size=VOCAB_SIZE, **(sizes | ids | changes))
        return getattr(hf, f"{name}{kind or 'ForCausalLM'}")(config)
    assert family == "bart"
    sizes = {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": NUM_NEURONS,
        "decoder_ffn_dim": NUM_NEURONS,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 24,
        "activation_dropout": 0.2,
    }
    config = hf.BartConfig(vocab_size=VOCAB_SIZE, **(sizes | changes))
    return hf.BartForConditionalGeneration(config)
