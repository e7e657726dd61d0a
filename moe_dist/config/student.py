"""The recipe's `student` section: depth and width of a smaller student."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from moe_dist.config.sections import MAX_LAYERS, Integer, Section

MAX_WIDTH = 2**24
_MAPS = ("uniform", "last")


def _named_or_listed(value: Any) -> Any:
    if isinstance(value, list | tuple) and value:
        if all(isinstance(layer, int) and not isinstance(layer, bool) for layer in value):
            if max(value) >= MAX_LAYERS:
                raise ValueError(f"names a layer beyond {MAX_LAYERS:,}; give the teacher's own.")
            return value
    elif value in _MAPS:
        return value
    raise ValueError(
        "is no layer map; give uniform, last, or the numbers of teacher layers such as [2, 5]."
    )


LayerMap = Annotated[
    Literal["uniform", "last"] | tuple[Integer, ...], BeforeValidator(_named_or_listed)
]


class StudentConfig(Section):
    """How deep and wide the student is; a size not given is the teacher's."""

    num_layers: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_LAYERS,
        description="Layers of the student; the teacher's when not given.",
    )
    hidden_size: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_WIDTH,
        description="Width of the student's hidden states; the teacher's when not given. Where it "
        "differs, a learned map carries it to the teacher's width for the losses that compare "
        "hidden states.",
    )
    intermediate_size: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_WIDTH,
        description="Neurons in each of the student's feed-forward layers, before they are split "
        "into experts; the teacher's when not given.",
    )
    num_heads: Integer | None = Field(
        default=None,
        ge=1,
        le=MAX_WIDTH,
        description="Attention heads of the student; the teacher's when not given.",
    )
    layer_map: LayerMap = Field(
        default="uniform",
        description="The teacher layer that each student layer starts from and is compared with: "
        "spread evenly (`uniform`), the `last` ones, or a list of their numbers, from 0.",
    )
    init: Literal["importance", "truncate", "random"] = Field(
        default="importance",
        description="What a narrower student keeps of the chosen layers: neurons by their scores "
        "and dimensions by their size (`importance`), the first of each (`truncate`), or "
        "nothing, with new weights drawn by the seed (`random`).",
    )

    @property
    def is_smaller(self) -> bool:
        """Whether the student has another shape than its teacher."""
        sizes = (self.num_layers, self.hidden_size, self.intermediate_size, self.num_heads)
        return any(size is not None for size in sizes)
