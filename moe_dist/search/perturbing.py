"""The values that a trial of a population goes on with, near those of the trial that it follows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from moe_dist.config import RunConfig
from moe_dist.config.in_flight import changes_in_flight
from moe_dist.config.search_space import Dimension, Point, random_draw, sample_point

RESAMPLED = 0.25
"""How often a value is drawn anew and not moved."""
FACTORS = (0.8, 1.2)


def perturb(
    dimensions: tuple[Dimension, ...],
    config: RunConfig,
    drawn: Mapping[str, Any],
    generator: random.Random,
) -> Point:
    """Move what can change in flight; all else stays as it was drawn.

    A number of a range is multiplied by 0.8 or 1.2 and kept within the range; a choice goes to its
    neighbour in the list. One in four is drawn anew.

    Args:
        dimensions: of the space.
        config: the recipe.
        drawn: values of the trial whose weights are taken over.
        generator: source of chance.

    Returns:
        The new point.

    Source: Population Based Training of Neural Networks, arXiv:1711.09846.
    """
    anew = random_draw(generator)

    def draw(dimension: Dimension) -> Any:
        if dimension.path not in drawn:
            return anew(dimension)
        value = drawn[dimension.path]
        if not changes_in_flight(dimension.path):
            return value
        return anew(dimension) if generator.random() < RESAMPLED else _moved(dimension, value)

    def _moved(dimension: Dimension, value: Any) -> Any:
        if dimension.kind == "choice":
            index = dimension.values.index(value) + generator.choice((-1, 1))
            return dimension.values[min(max(index, 0), len(dimension.values) - 1)]
        low, high = dimension.values
        moved = min(max(value * generator.choice(FACTORS), low), high)
        if dimension.kind == "integers":
            return low + round((moved - low) / dimension.step) * dimension.step
        return moved

    return sample_point(dimensions, config, draw)
