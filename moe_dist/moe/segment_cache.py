"""What gates have seen travels in the key-value cache, through whatever happens to it.

A cache of transformers becomes an object of a subclass of its class, which keeps a `SegmentState`
for each layer beside its keys and values, and reorders, selects and crops both alike.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

from torch import Tensor

from moe_dist.errors import MissingInputError
from moe_dist.moe.segments import SegmentState

if TYPE_CHECKING:

    class _Cache:
        """What all caches of transformers do."""

        def reorder_cache(self, beam_idx: Tensor) -> None: ...
        def batch_select_indices(self, indices: Tensor) -> None: ...
        def batch_repeat_interleave(self, repeats: int) -> None: ...
        def crop(self, tokens_to_remove: int) -> None: ...
        def reset(self) -> None: ...

else:
    _Cache = object


class SegmentCarrier(_Cache):
    """A cache that carries the states of gates; mixed into the class that it has."""

    segment_states: dict[str, SegmentState]
    kept_merges: dict[str, Any]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder sequences, as beam search does."""
        super().reorder_cache(beam_idx)
        self._change(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        super().batch_select_indices(indices)
        self._change(lambda value: value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        super().batch_repeat_interleave(repeats)
        self._change(lambda value: value.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; a negative number says how many."""
        # Before the keys and values are gone, since gates cannot forget as much as they can.
        num_columns = max(0, -tokens_to_remove)
        cropped = {name: one.cropped(num_columns) for name, one in self.segment_states.items()}
        super().crop(tokens_to_remove)
        self.segment_states = cropped

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.segment_states = {}
        self.kept_merges = {}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Copy and pickle by the class that the cache had, since its own one is made here."""
        return _empty_carrier, (type(self).__bases__[1],), self.__dict__

    def _change(self, change: Any) -> None:
        self.segment_states = {
            name: state.on_batch(change) for name, state in self.segment_states.items()
        }


def past_states(cache: object, num_columns: int) -> Mapping[str, SegmentState]:
    """Read the states of gates that a cache of so many columns carries; none where it is empty.

    States of another number of columns are a MissingInputError: the cache was cut in some way that
    they do not follow.
    """
    states: dict[str, SegmentState] = getattr(_own_cache(cache), "segment_states", {})
    if num_columns == 0:
        return {}
    for name, state in states.items():
        if state.num_columns != num_columns:
            raise MissingInputError(
                f"the gate of {name} has seen {state.num_columns} tokens, and the key-value cache "
                f"holds {num_columns}",
                remedy="change a cache by its crop, reorder_cache, batch_select_indices and "
                "batch_repeat_interleave alone, or start with a new one",
            )
    return states


def kept_merges(cache: object) -> dict[str, Any]:
    """Give what a cache keeps of merged weights, by layer; to be changed."""
    found: dict[str, Any] = getattr(_own_cache(cache), "kept_merges", {})
    return found


def keep_states(output: object, states: Mapping[str, SegmentState], merges: dict[str, Any]) -> None:
    """Put the states of gates, and merges, into the cache that a stack's forward gives back."""
    if not states and not merges:
        return
    for cache in _caches(output):
        own: Any = _own_cache(cache)
        if not isinstance(own, SegmentCarrier):
            own.__class__ = _carrying(cast(Hashable, type(own)))
        own.segment_states = dict(states)
        own.kept_merges = merges


@functools.cache
def _carrying(kind: Hashable) -> type:
    assert isinstance(kind, type)
    return type(kind.__name__, (SegmentCarrier, kind), {"__module__": kind.__module__})


def _empty_carrier(kind: type) -> Any:
    carrying: Any = _carrying(cast(Hashable, kind))
    return carrying.__new__(carrying)


def _own_cache(cache: object) -> object:
    """Give the decoder's own part of an encoder-decoder's cache."""
    return getattr(cache, "self_attention_cache", cache)


def _caches(output: object) -> Iterator[object]:
    found = getattr(output, "past_key_values", None)
    values = output if isinstance(output, tuple) else (found,)
    for value in values:
        if hasattr(value, "get_seq_length"):
            yield value
