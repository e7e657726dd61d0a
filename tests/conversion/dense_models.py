"""Tiny random models of every family, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCAB_SIZE = 50
NUM_NEURONS = 32

_BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": NUM_NEURONS,
    "max_position_embeddings": 24,
}
_DEBERTA = _BERT | {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}
_LLAMA = _BERT | {"num_attention_heads": 4, "num_key_value_heads": 2}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": NUM_NEURONS,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_SIZES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT | {"embedding_size": 8},
    "mpnet": _BERT | {"pad_token_id": 1},
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA
    | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3},
    "distilbert": {
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dim": NUM_NEURONS,
        "max_position_embeddings": 24,
    },
    "modernbert": _BERT
    | {"local_attention": 4, "mlp_bias": True, "mlp_dropout": 0.2, "attention_dropout": 0.1}
    | {"cls_token_id": 1, "sep_token_id": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": NUM_NEURONS, "n_positions": 24},
    "t5": _T5,
    "bart": {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": NUM_NEURONS,
        "decoder_ffn_dim": NUM_NEURONS,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 24,
        "activation_dropout": 0.2,
    },
    "llama": _LLAMA | {"mlp_bias": True, "attention_dropout": 0.1},
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 8},
}
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
EVERY_FAMILY = (*_SIZES, *_VARIANTS)
FAMILY_NAMES = ("bert", "gpt2", "t5", "t5-gated", "bart", "llama", "modernbert")
"""One of each layout of the FFN's weights."""
_USUAL_HEADS = ("ForConditionalGeneration", "LMHeadModel", "ForCausalLM")


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


def labelled_batch(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Random texts with labels for the model's head; those of tokens leave padding out."""
    batch = token_batch(seed=seed)
    if type(model).__name__.endswith("ForSequenceClassification"):
        return batch | {"labels": torch.tensor([0, 1, 1, 0])}
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


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


def kinds_of(family: str) -> tuple[str, ...]:
    """Name the heads that a family can have, such as ForMaskedLM, its usual one first."""
    from moe_dist.conversion.families import FAMILIES

    spec = FAMILIES[_VARIANTS.get(family, (family,))[0]]
    name = spec.config_class.removesuffix("Config")
    kinds = [head.removeprefix(name) for head in spec.heads]
    usual = [kind for kind in _USUAL_HEADS if kind in kinds]
    return tuple(dict.fromkeys([*usual, "ForSequenceClassification", *kinds]))


def _build(family: str, kind: str, changes: dict[str, Any]) -> Any:
    import transformers

    from moe_dist.conversion.families import FAMILIES

    model_type, own = _VARIANTS.get(family, (family, {}))
    spec = FAMILIES[model_type]
    name = spec.config_class.removesuffix("Config")
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type in ("t5", "bart"):
        ids = {}  # theirs are small numbers
    config = getattr(transformers, spec.config_class)(
        vocab_size=VOCAB_SIZE, **(ids | _SIZES[model_type] | own | changes)
    )
    return getattr(transformers, f"{name}{kind or kinds_of(family)[0]}")(config)
