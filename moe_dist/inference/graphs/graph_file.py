"""What a format of graphs writes, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe_dist.inference.graphs.nearness import Nearness
from moe_dist.inference.graphs.tracing import GraphSpec

TEXTS = '["a fine film", "a dull one, and far too long"]'
PAIRS = '[("who made it?", "Ada made it"), ("when?", "it was made in May, and late")]'
"""What the lines of a reader answer, and what they do where a model reads pairs."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the numbers that a graph holds.

    Attributes:
        int8: weights of products and tables of embeddings.
        fp32: all other real numbers: biases, norms, routers, scales.
        integers: tables of hash routers, sizes.
    """

    int8: int
    fp32: int
    integers: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.int8 + self.fp32 + self.integers

    @property
    def share_int8(self) -> float:
        """The part of weights in int8; tables of hash routers are none."""
        return self.int8 / max(1, self.int8 + self.fp32)


@dataclass(frozen=True)
class GraphFile:
    """What was written.

    Attributes:
        spec: what the graph reads and gives.
        bytes: of its numbers.
        nearness: of its answers to those of the model in eager float32.
    """

    spec: GraphSpec
    bytes: WeightBytes
    nearness: Nearness


class GraphFormat(Protocol):
    """A kind of file that a model is written as.

    Attributes:
        title: in people's words.
        graph: the file's name.
        facts: name of the file beside it that says what it reads and gives.
        precisions: of its weights.
        reader: lines of Python that answer `TEXTS` in its directory.
    """

    title: str
    graph: str
    facts: str
    reader: str
    precisions: tuple[str, ...]

    def require(self) -> None:
        """See that what it needs is there; else a MissingInputError names what to install."""
        ...

    def write(self, model: Any, precision: str, path: Path) -> GraphFile:
        """Write a model on the CPU, and compare what was written with it.

        Args:
            model: dense or converted; its weights may be float32 afterwards.
            precision: one of `precisions`.
            path: of the graph.

        Returns:
            What was written.

        Raises:
            ConversionError: if the model has no such graph, or the graph answers otherwise.
        """
        ...
