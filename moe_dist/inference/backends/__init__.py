"""Forms in which a model answers: the same model, and the same answers, at another speed.

A form is a backend and a precision. `eager` in float32 is the model as it was trained, and what
all others are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from moe_dist.errors import ConversionError
from moe_dist.inference.backends.answers_only import refuse_prepared
from moe_dist.inference.backends.eager import Eager
from moe_dist.inference.backends.lean import Lean
from moe_dist.inference.backends.onnx import Onnx


class Backend(Protocol):
    """How a model is brought into a form, in the precisions that it has.

    Attributes:
        precisions: names of them.
        is_quick: whether it takes a second or two, and not a minute; others have to be asked for.
    """

    precisions: tuple[str, ...]
    is_quick: bool

    def prepare(self, model: Any, precision: str) -> Any:
        """Make a copy, in eval mode, whose `forward` takes and gives what the model's own does.

        What a backend does not take is a ConversionError with the reason.
        """
        ...


BACKENDS: dict[str, Backend] = {"eager": Eager(), "lean": Lean(), "onnx": Onnx()}


@dataclass(frozen=True)
class Form:
    """A backend by its name in `BACKENDS`, and one of its precisions; else a ConversionError."""

    backend: str = "eager"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """See that both exist."""
        self._find(self.backend, tuple(BACKENDS))
        self._find(self.precision, BACKENDS[self.backend].precisions)

    def _find(self, given: str, known: tuple[str, ...]) -> None:
        if given not in known:
            raise ConversionError(
                f"there is no form {self}: {given!r} is not one of {', '.join(known)}",
                remedy="write for example eager-fp32 or lean-bf16",
            )

    @classmethod
    def parse(cls, text: str) -> Form:
        """Read `BACKEND-PRECISION`."""
        backend, _, precision = text.partition("-")
        return cls(backend, precision)

    def __str__(self) -> str:
        """Write `BACKEND-PRECISION`."""
        return f"{self.backend}-{self.precision}"

    def prepare(self, model: Any) -> Any:
        """Bring a model on the CPU into this form, see `Backend.prepare`."""
        refuse_prepared(model)
        return BACKENDS[self.backend].prepare(model, self.precision)


ORACLE = Form()
ALL_FORMS = tuple(
    Form(name, precision) for name, backend in BACKENDS.items() for precision in backend.precisions
)
QUICK_FORMS = tuple(form for form in ALL_FORMS if BACKENDS[form.backend].is_quick)
"""What is tried where nobody has said which forms."""
