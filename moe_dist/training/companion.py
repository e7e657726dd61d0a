"""What is trained beside a student and not saved with it: feature maps and a discriminator.

It is attached to the student as one more module, so that engines, gradient reduction and
checkpoints treat it as they treat the student, at any world size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from moe_dist.conversion.attention import num_attention_heads
from moe_dist.conversion.families import find_stacks
from moe_dist.conversion.heads import family_spec
from moe_dist.errors import ConversionError
from moe_dist.training.adversary import Adversary
from moe_dist.training.feature_maps import FeatureMaps

if TYPE_CHECKING:
    from moe_dist.config.objectives import ObjectivesConfig

ATTRIBUTE = "distillation_companion"


class Companion(nn.Module):
    """Feature maps, and a discriminator where one is wanted.

    Args:
        maps: what carries the student's features to the teacher's width.
        adversary: the discriminator.
    """

    def __init__(self, maps: FeatureMaps, adversary: Adversary | None = None) -> None:
        super().__init__()
        self.maps = maps
        self.adversary = adversary

    def after_step(self, num_samples: int) -> dict[str, float]:
        """Train what has an optimizer of its own, collective; values for the metric log."""
        return {} if self.adversary is None else self.adversary.update(num_samples)


def build_companion(
    student: nn.Module,
    teacher: nn.Module,
    section: ObjectivesConfig,
    *,
    num_pairs: int,
    hidden_ids: Sequence[int] | None = None,
    seed: int = 0,
) -> Companion:
    """Make what the losses of a run need beside the student.

    Args:
        student: the model that learns.
        teacher: the model that it is compared with.
        section: the recipe's ``distill``.
        num_pairs: how many hidden states are compared.
        hidden_ids: the teacher's dimension of each of the student's.
        seed: of the discriminator's weights.

    Returns:
        The companion; without parameters or buffers where nothing is needed.

    Raises:
        ConversionError: if attention is compared and the models differ in heads, or hidden
            widths differ and nothing says which dimensions belong together.
    """
    widths = [_width(model) for model in (student, teacher)]
    if widths[0] != widths[1] and hidden_ids is None:
        raise ConversionError(
            f"the student is {widths[0]} wide and the teacher {widths[1]}, and nothing says which "
            "dimensions belong together",
            remedy="make the student with the stage shrink, or pass hidden_ids",
        )
    if section.attention_weight > 0:
        check_heads(student, teacher)
    is_played = section.adversarial_weight > 0
    maps = FeatureMaps(
        *widths,
        hidden_ids=hidden_ids,
        hidden=section.hidden_weight > 0,
        sentence=is_played or section.alignment_weight > 0,
        num_projections=num_pairs if section.mapping_weight > 0 else 0,
    )
    if not is_played:
        return Companion(maps)
    config: Any = teacher.config
    return Companion(
        maps,
        Adversary(
            int(config.num_labels) + widths[1],
            regularizer=section.adversarial_regularizer,
            learning_rate=section.adversarial_learning_rate,
            seed=seed,
        ),
    )


def check_heads(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse models whose attention scores cannot be compared, with a ConversionError."""
    own, other = num_attention_heads(student), num_attention_heads(teacher)
    if own != other:
        raise ConversionError(
            f"distill.attention_weight compares attention head by head, and the student has {own} "
            f"heads where the teacher has {other}",
            remedy=f"set student.num_heads to {other}, or distill.attention_weight to 0",
        )


def check_pooling(model: nn.Module, section: ObjectivesConfig) -> None:
    """See that the state which stands for a sentence has seen it; else a ConversionError."""
    is_read = section.alignment_weight > 0 or section.adversarial_weight > 0
    if not is_read or section.alignment_pooling != "cls":
        return
    *_, (last, is_causal) = find_stacks(model, family_spec(model))
    if is_causal:
        raise ConversionError(
            f"distill.alignment_pooling=cls takes the first token's state, and in "
            f"{type(last).__name__} it sees no other token",
            remedy="set distill.alignment_pooling to mean or max",
        )


def _width(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.hidden_size)


def attach(student: nn.Module, companion: Companion) -> None:
    """Make the companion part of what is trained and checkpointed; forward does not see it."""
    student.add_module(ATTRIBUTE, companion)


def detach(student: nn.Module) -> None:
    """Take the companion off, so that the student is saved alone."""
    if hasattr(student, ATTRIBUTE):
        delattr(student, ATTRIBUTE)
