"""How much the task loss would change without each FFN neuron: exact, one backward a batch.

Shapes: B batch, S sequence, D model, F FFN, C classes, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_dist.conversion.families import FFNSlot, find_slots
from moe_dist.conversion.heads import answered_kind
from moe_dist.conversion.hidden_states import with_decoder_mask
from moe_dist.errors import ConversionError, MissingInputError

INDEX = "index"
"""Column of batches that a kind of task made of rows (`moe_dist.data.loaders.eval_batches`): the
kind says what a model takes of them. Other batches hold what transformers' models take."""

PerSampleLoss = Callable[[nn.Module, Any, Mapping[str, Any]], Tensor]


class Reader(Protocol):
    """Reads one layer while a batch passes through it; `leaves` is where the graph begins."""

    leaves: list[Tensor]

    def install(self) -> None:
        """Hook the layer."""
        ...

    def remove(self) -> None:
        """Take the hooks off again."""
        ...


ReaderT = TypeVar("ReaderT", bound=Reader)
CaptureT = TypeVar("CaptureT", bound="Capture")


def score_importance(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    per_sample_loss: PerSampleLoss | None = None,
) -> list[Tensor]:
    """Score each FFN neuron: the sum over samples of ``|w1·∂L/∂w1 + w2·∂L/∂w2|``.

    L is one sample's task loss. Both dot products are read from what the backward pass holds
    anyway: with pre-activation z, its bias b and activation a they are ``Σ_t (z-b)·∂L/∂z`` and
    ``Σ_t a·∂L/∂a``, so a batch needs one backward and no weight gradient. A gated FFN has one
    more such term. The model is scored in eval mode and left as it was.

    Args:
        model: the fine-tuned dense model.
        batches: dicts of model inputs with "labels" (question answering: start_positions and
            end_positions); other entries are ignored. Take training data, not the dev split.
        per_sample_loss: (model, outputs, batch) -> (B,) losses, for heads with a loss of their
            own; by default the head's usual one.

    Returns:
        One float32 (F,) tensor on the CPU for each FFN. Sums, so shards of the data add up.

    Raises:
        ConversionError: for an unknown architecture, no batches, or scores that are not finite.

    Source: MoEBERT, 2022.naacl-main.116, section 3.1.
    """

    def read(captures: Sequence[Capture]) -> list[Tensor]:
        return [one.scores_BF().abs().sum(dim=0, dtype=torch.float64) for one in captures]

    totals = sum_over_batches(
        model, batches, read, per_sample_loss=per_sample_loss, capture=Capture
    )
    scores = [total.to("cpu", torch.float32) for total in totals]
    for slot, score_F in zip(find_slots(model), scores, strict=True):
        if not bool(torch.isfinite(score_F).all()):
            raise ConversionError(
                f"importance of FFN {slot.index} ({slot.name}) is not finite",
                remedy="check the teacher and the training data for NaN and infinity",
            )
    return scores


def sum_over_batches(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    read: Callable[[Sequence[CaptureT]], Sequence[Tensor]],
    *,
    per_sample_loss: PerSampleLoss | None = None,
    capture: Callable[[FFNSlot], CaptureT],
) -> list[Tensor]:
    """Run forward and backward on each batch, and add up what `read` takes from FFN captures.

    Arguments and errors as in `sum_of_readers`, besides a ConversionError for an unknown
    architecture; `capture` makes what reads one FFN while a batch passes through it.
    """
    slots = find_slots(model)
    with ExitStack() as stack:
        if per_sample_loss is None:
            # A loss of the caller's may read any position of any hidden state.
            stack.enter_context(_only_positions_that_count(model, slots[-1]))
        return sum_of_readers(
            model,
            batches,
            read,
            per_sample_loss=per_sample_loss,
            readers=lambda: [capture(slot) for slot in slots],
        )


def sum_of_readers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    read: Callable[[Sequence[ReaderT]], Sequence[Tensor]],
    *,
    per_sample_loss: PerSampleLoss | None = None,
    readers: Callable[[], Sequence[ReaderT]],
) -> list[Tensor]:
    """Run a model forward and backward on each batch, and add up what is read from its layers.

    Args:
        model: evaluated, and left as it was.
        batches: as `score_importance` takes them.
        read: from one reader for each layer to one tensor for each, of the same shapes every time.
        per_sample_loss: as in `score_importance`.
        readers: makes those of one batch.

    Returns:
        The sums.

    Raises:
        ConversionError: if there are no batches.
    """
    loss_of = per_sample_loss or task_losses
    totals: list[Tensor] = []
    with frozen_in_eval_mode(model), torch.enable_grad():
        for batch in batches:
            fresh = readers()
            try:
                for one in fresh:
                    one.install()
                moved = on_device(model, batch)
                outputs = run_model(model, moved)
                losses_B = loss_of(model, outputs, moved)
                leaves = [leaf for one in fresh for leaf in one.leaves]
                # Whatever the forward pass is computed in: sums of scores keep their digits.
                with torch.autocast(losses_B.device.type, enabled=False):
                    losses_B.sum().backward(inputs=leaves)
                    found = read(fresh)
            finally:
                for one in fresh:
                    one.remove()
            totals = (
                [old + new for old, new in zip(totals, found, strict=True)] if totals else [*found]
            )
    if not totals:
        raise ConversionError(
            "there are no batches to score importance on",
            remedy="pass a few thousand training samples",
        )
    return totals


def evened(scores: Sequence[Tensor]) -> list[Tensor]:
    """Let tasks count alike: scale one task's scores to sum 1 in each FFN; zeros stay."""
    return [score_F / score_F.sum().clamp(min=1e-30) for score_F in scores]


def task_losses(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Compute each sample's task loss, (B,) float32, as the model's head would for it alone.

    A batch without labels is a MissingInputError.
    """
    if INDEX in batch:
        kind = answered_kind(model)
        return kind.scored_losses(kind.predictions(model, outputs, batch), batch)
    if hasattr(outputs, "start_logits"):
        start = _cross_entropy(outputs.start_logits, _labels(batch, "start_positions"))
        end = _cross_entropy(outputs.end_logits, _labels(batch, "end_positions"))
        return (start + end) / 2
    labels = _labels(batch, "labels")
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise MissingInputError(
            f"{type(model).__name__} has no task head, so there is no loss to score with",
            remedy="score a model with a head, such as one for sequence classification, or "
            "pass per_sample_loss",
        )
    if logits.dim() == 3:
        return _token_losses(model, logits, labels)
    if labels.dim() == 2 and labels.shape[1] > 1 and labels.is_floating_point():
        losses_BC = functional.binary_cross_entropy_with_logits(
            logits.float(), labels.float(), reduction="none"
        )
        return losses_BC.mean(dim=-1)
    return answered_kind(model).losses(logits, {"labels": labels})


class Capture:
    """Reads one FFN's per-sample products while a batch passes through it."""

    def __init__(self, slot: FFNSlot) -> None:
        self.slot = slot
        self.leaves: list[Tensor] = []
        self.products: list[Tensor] = []
        self._handles: list[Any] = []

    def install(self) -> None:
        """Hook the FFN's linear layers."""
        for linear in (self.slot.linear_in, self.slot.gate):
            if linear is not None:
                self._handles.append(linear.register_forward_hook(self._after_linear))
        self._handles.append(
            self.slot.linear_out.register_forward_pre_hook(self._before_linear_out)
        )

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

    def scores_BF(self) -> Tensor:
        """Signed score of each sample; the absolute value comes after all terms are added."""
        if not self.products:
            # The loss does not depend on this FFN, so removing a neuron changes nothing.
            return torch.zeros(1, self.slot.num_neurons)
        return torch.stack(self.products).sum(dim=0)

    def _after_linear(self, linear: nn.Module, args: tuple[Any, ...], z_BSF: Tensor) -> Tensor:
        # Where nothing below needs a gradient (the first layer), the graph begins here.
        if not z_BSF.requires_grad:
            z_BSF.requires_grad_()
            self.leaves.append(z_BSF)
        value, bias = z_BSF.detach(), linear.bias
        z_BSF.register_hook(lambda grad: self._add(value, bias, grad))
        return z_BSF

    def _before_linear_out(self, linear: nn.Module, args: tuple[Any, ...]) -> None:
        a_BSF: Tensor = args[0]
        value = a_BSF.detach()
        a_BSF.register_hook(lambda grad: self._add(value, None, grad))

    def _add(self, value_BSF: Tensor, bias: Any, grad_BSF: Tensor) -> None:
        value_BSF, grad_BSF = value_BSF.float(), grad_BSF.float()
        # An einsum would transpose both into a batched matrix product: slower by far.
        product_BF = (value_BSF * grad_BSF).sum(dim=1)
        if bias is not None:
            product_BF = product_BF - bias.detach().float() * grad_BSF.sum(dim=1)
        self._keep(product_BF)

    def _keep(self, product: Tensor) -> None:
        """Keep products of a layer's outputs; a fused layer has several for each neuron."""
        own = product.unflatten(-1, (-1, self.slot.num_neurons)).sum(dim=-2)
        # Added up at once: those of single tokens are as large as the activations.
        self.products = [self.products[0].add_(own)] if self.products else [own]


@contextmanager
def frozen_in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Keep a model in eval mode and its parameters without gradient, and put both back."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, flag in wanted:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@contextmanager
def _only_positions_that_count(model: nn.Module, last: FFNSlot) -> Iterator[None]:
    """Cut the last block to the first position, where the head reads no other.

    The other positions' scores are zero, so that only their computation is saved: most of a
    block, forward and backward.
    """
    spec = last.spec
    chunked = bool(getattr(model.config, "chunk_size_feed_forward", 0))
    if type(model).__name__ not in spec.first_token_heads or chunked:
        yield
        return
    module = last.block.get_submodule(spec.attention_out)
    handle = module.register_forward_pre_hook(_cut_to_first_position)
    try:
        yield
    finally:
        handle.remove()


def _cut_to_first_position(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value_BSD[:, :1] for value_BSD in args)


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch to the model's one device."""
    device = next(model.parameters()).device
    return {
        key: value.to(device) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def accepted_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a model's forward does not take, and labels where it can do without."""
    if INDEX in batch:
        return dict(answered_kind(model).inputs(model, batch))
    names = inspect.signature(model.forward).parameters
    inputs = {key: value for key, value in batch.items() if key in names}
    config: Any = model.config
    if not config.is_encoder_decoder:
        # The model would only compute its own mean loss with them. An encoder-decoder needs
        # them: it makes its decoder's inputs from them.
        inputs.pop("labels", None)
        return inputs
    return with_decoder_mask(inputs) if "decoder_attention_mask" in names else inputs


def run_model(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Any:
    """Run a model on what it takes of a batch; `options` are what its forward takes beside."""
    if INDEX in batch:
        return answered_kind(model).run(model, batch, **options)
    return model(**accepted_inputs(model, batch), **options)


def _labels(batch: Mapping[str, Any], name: str) -> Tensor:
    labels = batch.get(name)
    if not isinstance(labels, Tensor):
        raise MissingInputError(
            f"a batch holds no {name!r}, and importance is measured on the task loss",
            remedy=f"add a tensor {name!r} to each batch",
        )
    return labels


def _cross_entropy(logits_BC: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits_BC.float(), labels.reshape(-1).long(), reduction="none")


def _token_losses(model: nn.Module, logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean over the labelled tokens of each sample; a causal head predicts the next one."""
    if type(model).__name__.endswith(("LMHeadModel", "ForCausalLM")):
        logits_BSV, labels_BS = logits_BSV[:, :-1], labels_BS[:, 1:]
    losses_BS = functional.cross_entropy(
        logits_BSV.float().transpose(1, 2), labels_BS, ignore_index=-100, reduction="none"
    )
    counts_B = (labels_BS != -100).sum(dim=1)
    return losses_BS.sum(dim=1) / counts_B.clamp(min=1)
