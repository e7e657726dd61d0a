"""Models of random weights to be measured, as their time does not depend on training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .sizes import below_one

OPTIONS = {
    "d_model": "--d-model",
    "num_layers": "--layers",
    "num_neurons": "--neurons",
    "num_experts": "--experts",
    "expert_size": "--expert-size",
    "top_k": "--top-k",
    "router": "--router",
}
"""What a command calls the fields of `RandomModels`."""


@dataclass(frozen=True)
class RandomModels:
    """A teacher, a student with experts of it, and a dense student of the same active size.

    Args:
        d_model: width; heads of attention are 32 wide.
        num_layers: of each.
        num_neurons: of the teacher's feed-forward networks.
        num_experts: of the student's.
        expert_size: neurons of one expert, none of them shared.
        top_k: experts of a token; the dense student has so many times `expert_size` neurons.
        router: of the student, one that needs nothing but random weights.
    """

    d_model: int = 768
    num_layers: int = 2
    num_neurons: int = 3072
    num_experts: int = 4
    expert_size: int = 768
    top_k: int = 1
    router: str = "token_gate"

    def faults(self) -> list[str]:
        """Say what does not fit."""
        sizes = ("d_model", "num_layers", "num_neurons", "num_experts", "expert_size", "top_k")
        found = below_one(self, *sizes, called=OPTIONS)
        if not found and self.d_model % 32:
            found.append(f"--d-model {self.d_model} is no multiple of 32, the width of a head")
        if self.num_experts * self.expert_size > self.num_neurons:
            found.append(
                f"--experts {self.num_experts} of --expert-size {self.expert_size} are more than "
                f"--neurons {self.num_neurons}"
            )
        if self.top_k > self.num_experts:
            found.append(f"--top-k {self.top_k} is more than --experts {self.num_experts}")
        if self.router not in FREE_ROUTERS:
            found.append(f"--router {self.router} is not one of {', '.join(FREE_ROUTERS)}")
        return found

    def build(self) -> dict[str, Any]:
        """Draw them, by name."""
        from moe_dist.conversion import dense_to_moe, plan_partition

        teacher, dense = (
            self._draw(neurons).eval()
            for neurons in (self.num_neurons, self.top_k * self.expert_size)
        )
        plan = plan_partition(
            [torch.rand(self.num_neurons) for _ in range(self.num_layers)],
            num_experts=self.num_experts,
            expert_size=self.expert_size,
            num_shared_neurons=0,
        )
        student = dense_to_moe(teacher, plan, router=self.router, top_k=self.top_k).eval()
        return {"teacher": teacher, "student": student, "dense": dense}

    def _draw(self, num_neurons: int) -> Any:
        return random_classifier(
            vocab_size=1000,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_neurons=num_neurons,
        )


@dataclass(frozen=True)
class RandomDecoders(RandomModels):
    """The same of decoders of the Llama kind that write texts, heads 64 wide.

    Args:
        vocab_size: words, which the head scores at every step.
    """

    vocab_size: int = 49152

    def faults(self) -> list[str]:
        """Say what does not fit."""
        found = super().faults()
        if self.router == "sentence_gate":
            found.append("--router sentence_gate reads all tokens so far, and a cache hides them")
        return found

    def _draw(self, num_neurons: int) -> Any:
        return random_decoder(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            num_layers=self.num_layers,
            num_neurons=num_neurons,
        )


FREE_ROUTERS = ("token_gate", "sentence_gate", "hash_random")


def random_classifier(
    *,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_neurons: int,
    max_tokens: int = 512,
    seed: int = 0,
) -> Any:
    """Draw a BERT with a head for two classes, heads of attention 32 wide.

    It has positions for 512 tokens even where `max_tokens` is less.
    """
    from transformers import BertConfig, BertForSequenceClassification

    config: Any = BertConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, d_model // 32),
        intermediate_size=num_neurons,
        max_position_embeddings=max(512, max_tokens),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def random_decoder(
    *, vocab_size: int, d_model: int, num_layers: int, num_neurons: int, seed: int = 0
) -> Any:
    """Draw a Llama that writes texts: tied embeddings, heads 64 wide where that divides the width.

    Three heads share a key where their number lets them.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    num_heads = max(1, d_model // 64)
    config: Any = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads if num_heads % 3 else num_heads // 3,
        head_dim=d_model // num_heads,
        intermediate_size=num_neurons,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def random_language_model(
    *, vocab_size: int, d_model: int, num_layers: int, num_neurons: int, max_tokens: int
) -> Any:
    """Draw a BERT that predicts masked tokens, heads of attention 64 wide.

    Its attention is made of matrix products, which counters of FLOPs know on every device.
    """
    from transformers import BertConfig, BertForMaskedLM

    config: Any = BertConfig(
        vocab_size=vocab_size,
        hidden_size=d_model,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, d_model // 64),
        intermediate_size=num_neurons,
        max_position_embeddings=max(512, max_tokens),
        attn_implementation="eager",
    )
    return BertForMaskedLM(config).eval()
