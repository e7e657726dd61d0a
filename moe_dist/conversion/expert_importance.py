"""How much the task loss would change without each neuron of each expert, after training.

Shapes: B batch, S sequence, T tokens, D model, F neurons of one expert, s tied shared neurons,
E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.conversion.importance import PerSampleLoss, sum_of_readers
from moe_dist.errors import ConversionError
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer, moe_layers
from moe_dist.moe.merge import Merges
from moe_dist.moe.merged_layer import MergedLayer
from moe_dist.moe.routing import Routing


def score_expert_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    per_sample_loss: PerSampleLoss | None = None,
) -> list[Tensor]:
    """Score each neuron of each expert by what it does for the tokens that its router sends.

    As `score_importance` does for a dense FFN: the sum over samples of
    ``|w1·∂L/∂w1 + w2·∂L/∂w2|``, with the expert's own weights, one backward a batch and no weight
    gradient. The model is scored in eval mode and left as it was.

    Args:
        model: a converted model.
        batches: as `score_importance` takes them.
        per_sample_loss: as in `score_importance`.

    Returns:
        For each MoE layer a float32 (s + E·F,) tensor on the CPU: the tied shared neurons, then
        expert by expert. Sums, so shards of the data add up.

    Raises:
        ConversionError: for a model without experts, no batches, or scores that are not finite.

    Source: MoEBERT, 2022.naacl-main.116, section 3.1, whose scores are the dense model's; of
        experts after training is ours.
    """
    layers = moe_layers(model)

    def read(readers: Sequence[_LayerReader]) -> list[Tensor]:
        return [one.scores_BN().abs().sum(dim=0, dtype=torch.float64) for one in readers]

    totals = sum_of_readers(
        model,
        batches,
        read,
        per_sample_loss=per_sample_loss,
        readers=lambda: [_LayerReader(layer) for layer in layers],
    )
    scores = [total.to("cpu", torch.float32) for total in totals]
    for layer, score_N in zip(layers, scores, strict=True):
        if not bool(torch.isfinite(score_N).all()):
            raise ConversionError(
                f"importance in {layer.name} is not finite",
                remedy="check the student and the training data for NaN and infinity",
            )
    return scores


class _Seen:
    """What passed through a layer in one call, and the gradient of what came out."""

    def __init__(self, hidden_BSD: Tensor, routing: Routing | Merges | None) -> None:
        self.hidden_BSD = hidden_BSD
        self.routing = routing
        self.grad_BSD: Tensor | None = None

    def keep_gradient(self, grad_BSD: Tensor) -> None:
        self.grad_BSD = grad_BSD.detach()


class _LayerReader:
    """Reads one MoE layer while a batch passes through it."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self.leaves: list[Tensor] = []
        self._seen: list[_Seen] = []
        self._routing: Routing | Merges | None = None
        self._handles: list[Any] = []

    def install(self) -> None:
        self._handles.append(self.layer.register_forward_hook(self._after_layer))
        if self.layer.router is not None:
            self._handles.append(self.layer.router.register_forward_hook(self._after_router))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def scores_BN(self) -> Tensor:
        """Signed scores of each sample, (B, s + E·F); the absolute value comes after the sum."""
        parts = [self._scores_of(seen) for seen in self._seen if seen.grad_BSD is not None]
        if not parts:
            # The loss does not depend on this layer.
            shared = self.layer.num_shared_neurons
            experts = self.layer.experts
            return torch.zeros(1, shared + experts.num_experts * experts.expert_size)
        return torch.stack(parts).sum(dim=0)

    def _after_router(
        self, router: nn.Module, args: tuple[Any, ...], routing: Routing | Merges
    ) -> None:
        self._routing = routing

    def _after_layer(self, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Where nothing below needs a gradient (the first layer), the graph begins here.
        if not output.requires_grad:
            output.requires_grad_()
            self.leaves.append(output)
        seen = _Seen(args[0].detach(), self._routing)
        output.register_hook(seen.keep_gradient)
        self._seen.append(seen)
        return output

    def _scores_of(self, seen: _Seen) -> Tensor:
        assert seen.grad_BSD is not None
        num_samples, length = seen.hidden_BSD.shape[:2]
        rows_TD = seen.hidden_BSD.flatten(0, 1)
        if isinstance(self.layer, MergedLayer):
            rows_TD = self.layer.gate.prepare(rows_TD).detach()
        rows_TD = rows_TD.float()
        grad_TD = seen.grad_BSD.flatten(0, 1).float()
        sample_T = torch.arange(num_samples, device=rows_TD.device).repeat_interleave(length)
        parts = []
        if self.layer.shared is not None:
            products_TF = _products(self.layer.shared, 0, rows_TD, grad_TD)
            parts.append(_by_sample(products_TF, sample_T, num_samples))
        if isinstance(seen.routing, Merges):
            for products_TF in _merged_products(self.layer.experts, seen.routing, rows_TD, grad_TD):
                parts.append(_by_sample(products_TF, sample_T, num_samples))
            return torch.cat(parts, dim=1)
        for expert in range(self.layer.experts.num_experts):
            rows, weight = _rows_of(seen.routing, expert, len(rows_TD), rows_TD.device)
            own_grad = grad_TD[rows] * weight.unsqueeze(1)
            products_TF = _products(self.layer.experts, expert, rows_TD[rows], own_grad)
            parts.append(_by_sample(products_TF, sample_T[rows], num_samples))
        return torch.cat(parts, dim=1)


def _rows_of(
    routing: Routing | None, expert: int, num_tokens: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The tokens of an expert, and the weight that its output has for each."""
    if routing is None:
        return torch.arange(num_tokens, device=device), torch.ones(num_tokens, device=device)
    rows, columns = (routing.expert_ids == expert).nonzero(as_tuple=True)
    return rows, routing.expert_weights.detach()[rows, columns].float()


def _merged_products(
    experts: Experts, merges: Merges, rows_TD: Tensor, grad_TD: Tensor
) -> Iterator[Tensor]:
    """Give `_products` for each expert: its own weights, and what its merge makes of a token."""
    if experts.w_in is None or experts.w_out is None:
        yield from [rows_TD.new_zeros(len(rows_TD), 0)] * experts.num_experts
        return
    weights = {name: value.detach().float() for name, value in experts.named_parameters()}
    shares = {}
    for name, routing in merges.by_linear.items():
        own_GK = routing.expert_weights.detach().float()
        own_GE = own_GK.new_zeros(len(own_GK), experts.num_experts)
        shares[name] = own_GE.scatter(1, routing.expert_ids, own_GK)[merges.group_T]
    inputs = ("in", "gate") if experts.gated else ("in",)
    leaves = {}
    for name in inputs:
        total_TF = rows_TD.new_zeros(len(rows_TD), experts.expert_size)
        for expert in range(experts.num_experts):
            own_TF = functional.linear(rows_TD, weights[f"w_{name}"][expert])
            if f"b_{name}" in weights:
                own_TF = own_TF + weights[f"b_{name}"][expert]
            total_TF += shares[name][:, expert : expert + 1] * own_TF
        leaves[name] = total_TF.requires_grad_()
    with torch.enable_grad():
        active_TF = experts.activation(leaves[inputs[-1]])
        if experts.gated:
            active_TF = active_TF * leaves["in"]
    share_of_out, w_out = shares["out"], weights["w_out"]
    parts = [
        share_of_out[:, expert : expert + 1] * (grad_TD @ w_out[expert])
        for expert in range(experts.num_experts)
    ]
    grad_active_TF = torch.stack(parts).sum(dim=0)
    grads = torch.autograd.grad(active_TF, [leaves[name] for name in inputs], grad_active_TF)
    for expert in range(experts.num_experts):
        own = slice(expert, expert + 1)
        total_TF = share_of_out[:, own] * active_TF.detach() * (grad_TD @ w_out[expert])
        for name, grad_TF in zip(inputs, grads, strict=True):
            without_TF = functional.linear(rows_TD, weights[f"w_{name}"][expert])
            total_TF = total_TF + shares[name][:, own] * without_TF * grad_TF
        yield total_TF


def _by_sample(products_TF: Tensor, sample_T: Tensor, num_samples: int) -> Tensor:
    scores_BF = products_TF.new_zeros(num_samples, products_TF.shape[1])
    return scores_BF.index_add_(0, sample_T, products_TF)


def _products(experts: Experts, expert: int, rows_TD: Tensor, grad_TD: Tensor) -> Tensor:
    """What each token adds to ``w1·∂L/∂w1 + w2·∂L/∂w2``, (T, F); gradients are of the output."""
    if experts.w_in is None or experts.w_out is None:
        return rows_TD.new_zeros(len(rows_TD), 0)

    def linear(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        without_TF = functional.linear(rows_TD, weight[expert].detach().float())
        with_TF = without_TF if bias is None else without_TF + bias[expert].detach().float()
        return without_TF, with_TF.detach().requires_grad_()

    inputs = [linear(experts.w_in, experts.b_in)]
    if experts.w_gate is not None:
        inputs.append(linear(experts.w_gate, experts.b_gate))
    leaves = [leaf for _, leaf in inputs]
    with torch.enable_grad():
        active_TF = experts.activation(leaves[-1])
        if len(leaves) > 1:
            active_TF = active_TF * leaves[0]
    grad_active_TF = grad_TD @ experts.w_out[expert].detach().float()
    total_TF = active_TF.detach() * grad_active_TF
    grads = torch.autograd.grad(active_TF, leaves, grad_active_TF)
    for (without_TF, _), grad_TF in zip(inputs, grads, strict=True):
        total_TF = total_TF + without_TF * grad_TF
    return total_TF
