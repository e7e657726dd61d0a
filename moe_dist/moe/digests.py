"""The digest of each expert, by which a lost, doubled or swapped one is found and named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def expert_digests(stacked: Mapping[str, Tensor]) -> list[str]:
    """Hash each expert: SHA-256 in hexadecimal over its rows of the (E, ...) tensors, by name.

    There are none if there are no tensors.
    """
    tensors = [stacked[name].detach().to("cpu").contiguous() for name in sorted(stacked)]
    num_experts = tensors[0].shape[0] if tensors else 0
    digests = []
    for expert in range(num_experts):
        hasher = hashlib.sha256()
        for tensor in tensors:
            # As bytes, since numpy has no bfloat16.
            hasher.update(tensor[expert].reshape(-1).view(torch.uint8).numpy().data)
        digests.append(hasher.hexdigest())
    return digests


def numbered(digests: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Key the digests by `<layer>.<global expert>`, as manifests have them."""
    return {
        f"{layer}.{expert}": digest
        for layer, of_layer in digests.items()
        for expert, digest in enumerate(of_layer)
    }


def by_layer(experts: Mapping[str, str]) -> dict[str, list[str]]:
    """Undo `numbered`; digests come in global order."""
    sorted_keys = sorted((_layer_and_number(key), key) for key in experts)
    layers: dict[str, list[str]] = {}
    for (layer, _), key in sorted_keys:
        layers.setdefault(layer, []).append(experts[key])
    return layers


def _layer_and_number(key: str) -> tuple[str, int]:
    layer, _, number = key.rpartition(".")
    return layer, int(number)
