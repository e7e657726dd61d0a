"""A tiny model with a tokenizer, as a directory, and requests to it without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from moe_dist.conversion import dense_to_moe, plan_partition
from moe_dist.inference import save_model
from moe_dist.serving.requests import HttpAnswer, HttpRequest
from moe_dist.serving.service import TextService

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the film was good bad and dull".split()
NUM_POSITIONS = 24


def save_tiny(
    directory: Path, head: Any = BertForSequenceClassification, seed: int = 0, **config: Any
) -> Path:
    """A BERT of one layer with two experts."""
    vocabulary = directory.parent / "vocab.txt"
    vocabulary.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.write_text("\n".join(WORDS) + "\n")
    torch.manual_seed(seed)
    sizes = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=NUM_POSITIONS,
        **config,
    )
    dense = head(sizes).eval()
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if "LayerNorm" not in name:
                parameter.normal_(std=0.25)
    plan = plan_partition(
        [torch.rand(16)], num_experts=2, expert_size=8, num_shared_neurons=0, method="importance"
    )
    model = dense_to_moe(dense, plan, router="hash_random")
    return save_model(model, directory, BertTokenizer(vocab=str(vocabulary)))


def ask(
    service: TextService,
    content: Any = None,
    *,
    path: str = "/predict",
    method: str = "POST",
    kind: str | None = "application/json",
    raw: bytes | None = None,
) -> HttpAnswer:
    """One request by itself."""
    return asyncio.run(send(service, content, path=path, method=method, kind=kind, raw=raw))


async def send(
    service: TextService,
    content: Any = None,
    *,
    path: str = "/predict",
    method: str = "POST",
    kind: str | None = "application/json",
    raw: bytes | None = None,
) -> HttpAnswer:
    body = json.dumps(content).encode() if raw is None else raw
    headers = {} if kind is None else {"content-type": kind}
    return await service.handle(HttpRequest(method, path, headers, pieces(body)))


async def pieces(body: bytes, sizes: Sequence[int] = (7,)) -> AsyncIterator[bytes]:
    for first in range(0, len(body), sizes[0]):
        yield body[first : first + sizes[0]]
