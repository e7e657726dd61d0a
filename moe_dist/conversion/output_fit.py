"""Output weights of experts, fitted so that they give what the dense FFN gave.

Shapes: T tokens, D model, F neurons of one expert, s tied shared neurons, E experts, N unknowns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.conversion.families import FFNWeights, find_slots
from moe_dist.conversion.importance import frozen_in_eval_mode, on_device, run_model
from moe_dist.errors import ConversionError, MissingInputError
from moe_dist.moe.experts import Experts
from moe_dist.moe.layer import MoELayer, moe_layers
from moe_dist.moe.routing import Routing, current_context, padding_mask, use_task

RIDGE = 0.01
"""How firmly output weights are held where they were, as a part of the neurons' mean square."""
TOKENS_PER_NEURON = 0.1
"""They are held as if so many more tokens for each neuron of an expert had found them right."""
PRODUCT_DTYPE = torch.float32
"""In it the products of one batch's tokens are summed; batches and all that follows in float64."""
MAX_BYTES = 2 * 2**30
"""What the sums of the layers that are fitted in one pass may take, unless a layer needs more."""


def fit_outputs(
    student: nn.Module,
    dense: nn.Module,
    batches: Sequence[Iterable[Mapping[str, Any]]],
    *,
    ridge: float = RIDGE,
) -> None:
    """Refit `w_out` and `b_out` of a fresh student's experts to the dense FFNs' outputs.

    In each layer the sum over training tokens of ``c·|y - y'|²`` is made as small as possible,
    with y the dense FFN's output, y' the layer's for the experts that its router chooses, and
    ``c = 1 / mean((x + y)²)`` for the FFN's input x: where a normalisation follows, as in BERT and
    BART, it divides by just that size, and without it a few separator tokens decide. (GPT-2 and T5
    normalise x, so that there c only tempers tokens of large y.) All layers see the dense model's
    hidden states. A penalty holds weights and biases where they were, so that an expert that sees
    few tokens hardly moves. Tied shared neurons and all experts are solved for together. Input
    weights and routers stay, and so does a layer whose experts hold every neuron. Padding does
    not count, but in a decoder that is given no mask of its own. One pass over the batches does,
    or several for a model whose sums take more than `MAX_BYTES`, with the same result.

    Args:
        student: from `dense_to_moe`, with one expert for each token; its weights are changed.
        dense: the model that it was made from.
        batches: for each task, batches of training data, which can be gone through again.
        ridge: weight of the penalty, as a part of the mean square of the neurons' activations.

    Raises:
        ConversionError: if a token has several experts, or a fitted weight is not finite.
        MissingInputError: if there are no batches.

    Source: least squares after pruning is common (ThiNet, arXiv:1707.06342); by expert, with the
        tokens that its router sends to it, is ours.
    """
    slots = {slot.name: slot for slot in find_slots(dense)}
    fits: list[_LayerFit] = []
    for layer in moe_layers(student):
        if layer.merges:
            raise ConversionError(
                f"output weights are fitted for one expert a token, and {layer.name} merges its "
                "experts, whose gates start alike: only their mean could be fitted",
                remedy="set moe.fit_output to auto or false",
            )
        if layer.top_k != 1:
            raise ConversionError(
                f"output weights are fitted for one expert a token, and {layer.name} gives each "
                f"{layer.top_k}",
                remedy="set moe.top_k to 1, or moe.fit_output to auto or false",
            )
        slot = slots[layer.name]
        fits.append(_LayerFit(layer, slot.weights(), slot.activation))
    todo = [fit for fit in fits if not fit.is_exact]
    with frozen_in_eval_mode(student), torch.no_grad(), ExitStack() as stack:
        for fit in fits:
            stack.enter_context(fit.in_place())
        while todo:
            todo = _fit_some(student, todo, batches, ridge)


def _fit_some(
    student: nn.Module,
    todo: list[_LayerFit],
    batches: Sequence[Iterable[Mapping[str, Any]]],
    ridge: float,
) -> list[_LayerFit]:
    """Fit as many of the first layers as there is room for at once; return the others."""
    room, chosen = MAX_BYTES, 0
    while chosen < len(todo) and (not chosen or todo[chosen].num_bytes <= room):
        room -= todo[chosen].num_bytes
        chosen += 1
    for fit in todo[:chosen]:
        fit.start()
    num_batches = 0
    for task, own in enumerate(batches):
        with use_task(task):
            for batch in own:
                run_model(student, on_device(student, batch))
                num_batches += 1
    if not num_batches:
        raise MissingInputError(
            "there are no batches to fit output weights on",
            remedy="pass a few thousand training samples",
        )
    for fit in todo[:chosen]:
        fit.solve(ridge)
    return todo[chosen:]


class _LayerFit:
    """The least-squares problem of one layer: unknowns are (s shared, then F and a bias each)."""

    def __init__(self, layer: MoELayer, weights: FFNWeights, activation: nn.Module) -> None:
        self.layer = layer
        self._dense = weights
        self._activation = activation
        experts = layer.experts
        self._num_shared = layer.num_shared_neurons
        num_own = experts.expert_size + (experts.b_out is not None)
        num_seen, width = self._num_shared + num_own, weights.w_out.shape[0]
        self._gram_shape = (experts.num_experts, num_seen, num_seen)
        self._target_shape = (experts.num_experts, num_seen, width)
        self._is_counting = False
        self._mass = 0.0
        self._num_tokens = 0

    @property
    def is_exact(self) -> bool:
        """Whether the layer gives what the dense FFN gives as it is."""
        has_all = self.layer.experts.expert_size + self._num_shared == self._dense.w_in.shape[0]
        gate_scale = getattr(self.layer.router, "gate_scale", "straight_through")
        return has_all and gate_scale == "straight_through"

    @property
    def num_bytes(self) -> int:
        """What the sums take."""
        num_experts, num_seen, width = self._target_shape
        return 8 * num_experts * num_seen * (num_seen + width)

    def start(self) -> None:
        """Begin to count batches in."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": self._dense.w_out.device}
        self._gram_ENN = torch.zeros(self._gram_shape, **options)
        self._target_END = torch.zeros(self._target_shape, **options)
        self._is_counting = True

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the layer give what the dense FFN gives, and be seen; its own is not computed."""
        self.layer.forward = self._see  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.layer.forward

    def _see(self, hidden: Tensor) -> Tensor:
        """Count a batch in between `start` and `solve`; give what the dense FFN gives."""
        rows_TD = hidden.reshape(-1, hidden.shape[-1])
        dense, layer = self._dense, self.layer
        active_TF = _activations(
            rows_TD, dense.w_in, dense.b_in, dense.w_gate, dense.b_gate, self._activation
        )
        target_TD = functional.linear(active_TF, dense.w_out, dense.b_out)
        if not self._is_counting:
            return target_TD.view(hidden.shape)
        chosen_T = torch.zeros(len(rows_TD), dtype=torch.int64, device=rows_TD.device)
        weight_T = torch.ones(len(rows_TD), device=rows_TD.device)
        if layer.router is not None:
            routing: Routing = layer.router(rows_TD, current_context())
            chosen_T = routing.expert_ids[:, 0]
            weight_T = routing.expert_weights[:, 0].float()
        mask_T = padding_mask(layer.name, len(rows_TD), current_context())
        real_T = torch.ones_like(chosen_T, dtype=torch.bool) if mask_T is None else mask_T
        for expert in range(len(self._gram_ENN)):
            own_T = real_T & (chosen_T == expert)
            if bool(own_T.any()):
                self._count(expert, rows_TD[own_T], target_TD[own_T], weight_T[own_T])
        return target_TD.view(hidden.shape)

    def _count(self, expert: int, rows_TD: Tensor, target_TD: Tensor, weight_T: Tensor) -> None:
        seen = []
        if self.layer.shared is not None:
            seen.append(self._of_expert(self.layer.shared, 0, rows_TD))
        own_TF = self._of_expert(self.layer.experts, expert, rows_TD)
        if self.layer.experts.b_out is not None:
            own_TF = torch.cat([own_TF, own_TF.new_ones(len(own_TF), 1)], dim=1)
        seen.append(own_TF * weight_T.unsqueeze(1))
        with torch.autocast(rows_TD.device.type, enabled=False):
            target_TD = target_TD.to(PRODUCT_DTYPE)
            seen_TN = torch.cat(seen, dim=1).to(PRODUCT_DTYPE)
            count_T = 1 / (rows_TD + target_TD).square().mean(dim=1).clamp(min=1e-12)
            counted_NT = (seen_TN * count_T.unsqueeze(1)).T
            self._gram_ENN[expert] += counted_NT @ seen_TN
            self._target_END[expert] += counted_NT @ target_TD
        self._mass += float(count_T.sum(dtype=torch.float64))
        self._num_tokens += len(rows_TD)

    def _of_expert(self, experts: Experts, expert: int, rows_TD: Tensor) -> Tensor:
        if experts.w_in is None:
            return rows_TD.new_zeros(len(rows_TD), 0)
        b_in, w_gate, b_gate = (
            None if value is None else value[expert]
            for value in (experts.b_in, experts.w_gate, experts.b_gate)
        )
        return _activations(rows_TD, experts.w_in[expert], b_in, w_gate, b_gate, self._activation)

    @torch.no_grad()
    def solve(self, ridge: float) -> None:
        """Solve, write the weights into the layer, and let the sums go.

        The unknowns of the experts meet in the shared neurons alone: these are found first, with
        the experts eliminated from the equations (Schur complement), and then expert by expert.
        A fitted weight that is not finite is a ConversionError.
        """
        shared, num_experts = self._num_shared, len(self._gram_ENN)
        shared_SD, own_END = self._weights()
        before_END = torch.cat([shared_SD.expand(num_experts, -1, -1), own_END], dim=1)
        missed_END = self._target_END - self._gram_ENN @ before_END
        own_gram = self._gram_ENN[:, shared:, shared:]
        held = own_gram + torch.diag_embed(self._held_experts(ridge))
        if shared:
            cross = self._gram_ENN[:, shared:, :shared]
            # What an expert's own weights make up for, of the shared neurons and of what is missed.
            made_up = solve_definite(held, cross)
            gram_SS = self._gram_ENN[:, :shared, :shared].sum(dim=0)
            gram_SS = gram_SS + torch.diag(self._held_shared(ridge))
            gram_SS = gram_SS - (cross.transpose(1, 2) @ made_up).sum(dim=0)
            left_SD = missed_END[:, :shared] - made_up.transpose(1, 2) @ missed_END[:, shared:]
            change_SD = solve_definite(gram_SS, left_SD.sum(dim=0))
            missed_END = missed_END - self._gram_ENN[:, :, :shared] @ change_SD
            shared_SD = shared_SD + change_SD
        own_END = own_END + solve_definite(held, missed_END[:, shared:])
        if not bool(torch.isfinite(own_END).all() and torch.isfinite(shared_SD).all()):
            raise ConversionError(
                f"the fitted output weights of {self.layer.name} are not finite",
                remedy="check the teacher and the training data for NaN and infinity",
            )
        self._write(shared_SD, own_END)
        self._is_counting = False
        del self._gram_ENN, self._target_END

    def _held_experts(self, ridge: float) -> Tensor:
        """(E, F and a bias) penalties; the ridge is not for biases."""
        size = self.layer.experts.expert_size
        square_EF = self._gram_ENN.diagonal(dim1=1, dim2=2)[:, self._num_shared :][:, :size]
        prior = TOKENS_PER_NEURON * size * self._mass / max(self._num_tokens, 1)
        held_EN = torch.zeros_like(self._target_END[:, self._num_shared :, 0])
        if size:
            held_EN[:, :size] = ridge * square_EF.mean(dim=1, keepdim=True)
            held_EN[:, :size] += prior * square_EF.sum() / (size * max(self._mass, 1e-12))
        held_EN[:, size:] = prior
        return held_EN.clamp(min=1e-9)

    def _held_shared(self, ridge: float) -> Tensor:
        square_ES = self._gram_ENN.diagonal(dim1=1, dim2=2)[:, : self._num_shared]
        return (ridge * square_ES.sum(dim=0).mean()).expand(self._num_shared).clamp(min=1e-9)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """(s, D) of the shared neurons, and (E, F and a bias, D) of the experts."""
        experts, shared = self.layer.experts, self.layer.shared
        shared_SD = self._target_END.new_zeros(0, self._target_END.shape[2])
        if shared is not None and shared.w_out is not None:
            shared_SD = shared.w_out[0].T.double()
        own_END = torch.zeros_like(self._target_END[:, self._num_shared :])
        if experts.w_out is not None:
            own_END[:, : experts.expert_size] = experts.w_out.transpose(1, 2)
        if experts.b_out is not None:
            own_END[:, -1] = experts.b_out
        return shared_SD, own_END

    def _write(self, shared_SD: Tensor, own_END: Tensor) -> None:
        experts, shared = self.layer.experts, self.layer.shared
        if shared is not None and shared.w_out is not None:
            shared.w_out[0].copy_(shared_SD.T)
        if experts.w_out is not None:
            experts.w_out.copy_(own_END[:, : experts.expert_size].transpose(1, 2))
        if experts.b_out is not None:
            experts.b_out.copy_(own_END[:, -1])


def solve_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric systems, (..., N, N) and (..., N, D); NaN where one is not positive definite.

    Not by `torch.linalg.solve`: oneMKL's LU of several matrices at once fails on some CPUs with
    two threads or more (seen with torch 2.13 on an AMD EPYC with AVX-512, four of size 385).
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    found = torch.cholesky_solve(right, factor)
    return torch.where((failed != 0)[..., None, None], torch.nan, found)


def _activations(
    rows_TD: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """What the output weights are applied to, (T, F)."""
    linear_TF = functional.linear(rows_TD, w_in, b_in)
    if w_gate is None:
        return activation(linear_TF)
    return activation(functional.linear(rows_TD, w_gate, b_gate)) * linear_TF
