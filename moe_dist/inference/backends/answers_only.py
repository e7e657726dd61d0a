"""What a layer that was prepared to answer refuses to do, in place of doing it wrong in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from moe_dist.errors import ConversionError

_REMEDY = "use the model that it was prepared from, and prepare it again afterwards"


class AnswersOnly(nn.Module):
    """What answers and no more: it cannot learn, be saved, copied, cast or moved."""

    form: ClassVar[str] = "lean"

    def train(self, mode: bool = True) -> AnswersOnly:
        """Refuse to learn; `eval` changes nothing."""
        if mode:
            _refuse("learn", self.form)
        super().train(mode)
        return self

    def check_input(self, hidden: Tensor) -> None:
        """Refuse an input that wants a gradient."""
        if hidden.requires_grad and torch.is_grad_enabled():
            _refuse("give gradients", self.form)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("be saved", self.form)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NoReturn:
        _refuse("be cast or moved", self.form)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuse to be copied or pickled."""
        _refuse("be copied", self.form)


def refuse_as_a_whole(model: nn.Module) -> None:
    """Let a model refuse before its other layers have begun to learn, or have been cast."""

    def train(mode: bool = True) -> nn.Module:
        if mode:
            _refuse("learn")
        return type(model).train(model, mode)

    def apply(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse("be cast or moved")

    def resize(*args: Any, **kwargs: Any) -> NoReturn:
        _refuse("have its embeddings resized")

    methods = {"train": train, "_apply": apply, "resize_token_embeddings": resize}
    for name, method in methods.items():
        setattr(model, name, method)


def refuse_prepared(model: nn.Module) -> None:
    """See that a model has not been prepared before; else a ConversionError."""
    for module in model.modules():
        if isinstance(module, AnswersOnly):
            _refuse("be prepared twice", module.form)


def _refuse(what: str, form: str = AnswersOnly.form) -> NoReturn:
    raise ConversionError(f"a model in its {form} form cannot {what}", remedy=_REMEDY)
