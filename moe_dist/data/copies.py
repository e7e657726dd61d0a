"""Find texts that nearly repeat others, among a hundred thousand in seconds.

Every pair is found that comparing all pairs would find. Two sets that share a large part of the
smaller one share one of its rarest features, so only pairs that do are looked at, and of these only
the ones whose rare features leave room for enough others: prefix filtering, as in Bayardo et al.,
Scaling Up All Pairs Similarity Search, WWW 2007.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_SHINGLE_WORDS = 3
# A run of so many words that stands in this share of the different texts (and so many of them) is
# a template, signature or prompt, and says nothing about copying: the rest is compared.
_SHARED_WORDS = 8
_SHARED_SHARE = 0.2
_MIN_SHARING = 10
_SAME_SHARE = 0.9
# Products of sparse matrices are taken in blocks of so many multiplications, and pairs compared
# in chunks of so many features, so that neither takes more than a few hundred MiB.
_BLOCK = 2_000_000
_SILENT_S = 3.0
_LINE_EVERY_S = 10.0

logger = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class _Rule:
    """When two sets are near.

    Attributes:
        min_jaccard: from this share of common features on.
        min_nested: or from this share of the smaller one on; None where only the first counts.
        min_nested_size: if the smaller one has so many.
    """

    min_jaccard: float
    min_nested: float | None = None
    min_nested_size: int = 0

    def is_near(self, shared: Ints, size: Ints, other: Ints) -> Flags:
        """Tell for pairs of sets, by what they share, whether they are near."""
        near: Flags = (shared > 0) & (shared >= self.min_jaccard * (size + other - shared))
        if self.min_nested is not None:
            smaller = np.minimum(size, other)
            near |= (smaller >= self.min_nested_size) & (shared >= self.min_nested * smaller)
        return near

    def prefix(self, sizes: Ints) -> Ints:
        """How many of a set's rarest features hold one that any near set shares.

        With `min_nested` this is so of the smaller set and all of the larger one; without it of
        both.
        """
        # Near sets of s <= l share at least j / (1 + j) * (s + l), which is 2j / (1 + j) * s or
        # more; and at least j * l where nothing but j counts.
        share = self.min_jaccard
        if self.min_nested is not None:
            share = min(self.min_nested, 2 * share / (1 + share))
        needed: Ints = np.ceil(share * sizes - 1e-9).astype(np.int64)
        return sizes - np.maximum(needed, 1) + 1


# Word triples, and words, since short texts have few triples. A nested text must have 5 words.
_BY_SHINGLE = _Rule(min_jaccard=0.5, min_nested=0.8, min_nested_size=3)
_BY_WORD = _Rule(min_jaccard=0.75)


def near_copies(texts: Sequence[str], references: Sequence[str]) -> set[int]:
    """Positions of normalised texts that repeat a reference, nearly, hold it or lie in it."""
    exact = dict.fromkeys(references)
    others = list(dict.fromkeys(text for text in texts if text not in exact))
    near = _near(others, list(exact))
    copies = {text for text, is_near in zip(others, near.tolist(), strict=True) if is_near}
    return {row for row, text in enumerate(texts) if text in exact or text in copies}


def _near(texts: list[str], references: list[str]) -> Flags:
    """Tell of each text whether it is near a reference; all of them are different."""
    found = np.zeros(len(texts), dtype=np.bool_)
    if not texts or not references:
        return found
    progress = _Progress(len(texts), len(references))
    words = _without_shared_parts(_Words.of([*texts, *references]))
    for rule, features, rows in (
        (_BY_SHINGLE, words.shingles, words.shingle_rows),
        (_BY_WORD, words.ids, words.rows),
    ):
        sets = _Sets.of(features, rows, words.num_rows)
        progress.tell()
        theirs, _ = sets[len(texts) :].distinct()
        # Where near copies abound, a few references find most of them.
        num_first = len(theirs.sizes) // 16
        for part in (slice(num_first), slice(num_first, None)):
            left = np.flatnonzero(~found)
            ours, numbers = sets[left].distinct()
            found[left] = _Search(ours, theirs[part], rule).run(progress)[numbers]
    return found


@dataclass(frozen=True)
class _Words:
    """All texts, one after the other.

    Attributes:
        ids: number of each word.
        rows: text of each word.
        num_rows: number of texts.
    """

    ids: Ints
    rows: Ints
    num_rows: int

    @classmethod
    def of(cls, texts: Sequence[str]) -> _Words:
        """Number the words of normalised texts."""
        numbers: dict[str, int] = {}
        ids = np.fromiter(
            (numbers.setdefault(word, len(numbers)) for text in texts for word in text.split()),
            dtype=np.int64,
        )
        lengths = [len(text.split()) for text in texts]
        return cls(ids, np.repeat(np.arange(len(texts)), lengths), len(texts))

    @property
    def shingle_places(self) -> Ints:
        """Places of the words with which a shingle begins."""
        last = _SHINGLE_WORDS - 1
        return np.flatnonzero(self.rows[:-last] == self.rows[last:])

    @property
    def shingles(self) -> Ints:
        """Number of the shingle at each of its places."""
        import pandas

        places = self.shingle_places
        numbers = self.ids[places]
        for offset in range(1, _SHINGLE_WORDS):
            # Numbers stay below the number of words in all texts, so the products fit.
            numbers = numbers * (len(self.ids) + 1) + self.ids[places + offset]
            numbers = pandas.factorize(numbers)[0].astype(np.int64)
        return numbers

    @property
    def shingle_rows(self) -> Ints:
        """Text of each shingle."""
        return self.rows[self.shingle_places]


def _without_shared_parts(words: _Words) -> _Words:
    """Take out the long runs of words that many texts share."""
    import pandas

    shingles, places = words.shingles, words.shingle_places
    if not len(shingles):
        return words
    pairs = pandas.unique(shingles * words.num_rows + words.shingle_rows)
    frequencies = np.bincount(pairs // words.num_rows)
    is_shared = frequencies >= max(_MIN_SHARING, _SHARED_SHARE * words.num_rows)
    shared = places[is_shared[shingles]]
    if not len(shared):
        return words
    # Shingles of one text follow each other without a gap; between texts there is one. A word
    # beside the shared part, such as one of few answers, is much rarer and not of it.
    often = frequencies[shingles[is_shared[shingles]]]
    is_rarer = np.minimum(often[1:], often[:-1]) < _SAME_SHARE * np.maximum(often[1:], often[:-1])
    gaps = np.flatnonzero((np.diff(shared) > 1) | is_rarer)
    starts = shared[np.concatenate([[0], gaps + 1])]
    ends = shared[np.concatenate([gaps, [len(shared) - 1]])] + _SHINGLE_WORDS
    is_long = ends - starts >= _SHARED_WORDS
    steps = np.zeros(len(words.ids) + 1, dtype=np.int64)
    np.add.at(steps, starts[is_long], 1)
    np.add.at(steps, ends[is_long], -1)
    kept = np.cumsum(steps)[:-1] == 0
    return _Words(words.ids[kept], words.rows[kept], words.num_rows)


@dataclass(frozen=True)
class _Sets:
    """Sets of features, which are numbered from the rarest on.

    Attributes:
        matrix: (sets, features) ones, in each row from the rarest on.
    """

    matrix: csr_matrix

    @classmethod
    def of(cls, features: Ints, rows: Ints, num_rows: int) -> _Sets:
        """Gather the features of each row, once each."""
        import pandas

        num_features = int(features.max(initial=-1)) + 1
        rows, features = np.divmod(
            pandas.unique(rows * num_features + features), max(1, num_features)
        )
        order = np.argsort(np.bincount(features, minlength=num_features), kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = np.arange(num_features)
        rows, ranked = np.divmod(
            np.sort(rows * num_features + ranks[features]), max(1, num_features)
        )
        return cls(_ones(ranked, np.bincount(rows, minlength=num_rows), num_features))

    @property
    def sizes(self) -> Ints:
        """Features of each set."""
        sizes: Ints = np.diff(self.matrix.indptr).astype(np.int64)
        return sizes

    @property
    def frequencies(self) -> Ints:
        """In how many sets each feature is."""
        return np.bincount(self.matrix.indices, minlength=self.matrix.shape[1])

    def rarest(self, lengths: Ints) -> _Sets:
        """Keep so many features of each set, the rarest ones."""
        sizes = self.sizes
        places = np.arange(self.matrix.nnz) - np.repeat(self.matrix.indptr[:-1], sizes)
        kept = self.matrix.indices[places < np.repeat(lengths, sizes)]
        return _Sets(_ones(kept, np.minimum(lengths, sizes), self.matrix.shape[1]))

    def distinct(self) -> tuple[_Sets, Ints]:
        """Keep one of equal sets; gives the number of each row's set as well."""
        indices, bounds = self.matrix.indices, self.matrix.indptr.tolist()
        known: dict[bytes, int] = {}
        numbers = np.array(
            [known.setdefault(indices[a:b].tobytes(), len(known)) for a, b in pairwise(bounds)],
            dtype=np.int64,
        )
        return self[np.unique(numbers, return_index=True)[1]], numbers

    def __getitem__(self, rows: Ints | slice) -> _Sets:
        return _Sets(self.matrix[rows])


def _ones(indices: Ints, sizes: Ints, num_features: int) -> csr_matrix:
    from scipy.sparse import csr_matrix

    return csr_matrix(
        (np.ones(len(indices), dtype=np.int32), indices, np.concatenate([[0], np.cumsum(sizes)])),
        shape=(len(sizes), num_features),
    )


class _Search:
    """Looks for those of our sets that are near one of theirs.

    Args:
        ours: sets to examine.
        theirs: sets to compare with, numbered alike.
        rule: when two are near.
    """

    def __init__(self, ours: _Sets, theirs: _Sets, rule: _Rule) -> None:
        self._ours, self._theirs, self._rule = ours, theirs, rule
        self._sizes, self._their_sizes = ours.sizes, theirs.sizes
        self._their_rows = theirs.matrix.T.tocsr()
        self._costs = ours.matrix @ theirs.frequencies
        self.found = np.zeros(len(self._sizes), dtype=np.bool_)

    def run(self, progress: _Progress) -> Flags:
        """Tell of each of our sets whether it is near."""
        ours, theirs, rule = self._ours, self._theirs, self._rule
        our_prefixes = ours.rarest(rule.prefix(self._sizes))
        their_prefixes = theirs.rarest(rule.prefix(self._their_sizes))
        if rule.min_nested is None:
            probes = [(our_prefixes, their_prefixes)]
        else:
            probes = [(our_prefixes, theirs), (ours, their_prefixes)]
        for our_probes, their_probes in probes:
            their_rows = their_probes.matrix.T.tocsr()
            costs = our_probes.matrix @ their_probes.frequencies
            our_rest = self._sizes - our_probes.sizes
            their_rest = self._their_sizes - their_probes.sizes
            left = np.flatnonzero(~self.found & (costs > 0))
            for block in _blocks(costs[left]):
                row, other, counts = _products(our_probes, left[block], their_rows)
                # What is shared beyond the probes lies in the rest of one of the two: both hold
                # their rarest features, so the set whose probe ends first has the others there.
                most = counts + np.maximum(our_rest[row], their_rest[other])
                may_be = self._are_near(row, other, most)
                self._compare(row[may_be], other[may_be], counts[may_be])
                progress.tell()
        return self.found

    def _are_near(self, row: Ints, other: Ints, shared: Ints) -> Flags:
        return self._rule.is_near(shared, self._sizes[row], self._their_sizes[other])

    def _compare(self, row: Ints, other: Ints, counts: Ints) -> None:
        """Mark our sets of the pairs that are near; counts say which pairs are likely ones."""
        order = np.lexsort((-counts, row))
        row, other = row[order], other[order]
        is_first = np.diff(row, prepend=-1) > 0
        self._intersect(row[is_first], other[is_first])
        left = ~is_first & ~self.found[row]
        row, other = row[left], other[left]
        rows = np.unique(row)
        if (self._sizes[row] + self._their_sizes[other]).sum() < self._costs[rows].sum():
            self._intersect(row, other)
            return
        for block in _blocks(self._costs[rows]):
            row, other, shared = _products(self._ours, rows[block], self._their_rows)
            self.found[row[self._are_near(row, other, shared)]] = True

    def _intersect(self, row: Ints, other: Ints) -> None:
        for block in _blocks(self._sizes[row] + self._their_sizes[other]):
            one, two = row[block], other[block]
            both = self._ours.matrix[one].multiply(self._theirs.matrix[two])
            shared = np.asarray(both.sum(axis=1)).ravel()
            self.found[one[self._are_near(one, two, shared)]] = True


def _products(ours: _Sets, rows: Ints, their_rows: csr_matrix) -> tuple[Ints, Ints, Ints]:
    """Count what our sets of these rows share with theirs: row, their row, count."""
    counts = ours.matrix[rows] @ their_rows
    return np.repeat(rows, np.diff(counts.indptr)), counts.indices, counts.data


def _blocks(costs: Ints) -> Iterator[slice]:
    """Cut a sequence where the costs of a block add up to `_BLOCK`."""
    ends = np.flatnonzero(np.diff(np.cumsum(costs) // _BLOCK)) + 1
    bounds = [0, *ends.tolist(), len(costs)]
    for start, end in pairwise(bounds):
        if start < end:
            yield slice(start, end)


class _Progress:
    """Says now and then that a long search goes on."""

    def __init__(self, num_texts: int, num_references: int) -> None:
        self._what = f"{num_texts:,} rows are compared with {num_references:,} for near copies"
        self._started_s = time.monotonic()
        self._next_s = self._started_s + _SILENT_S

    def tell(self) -> None:
        """Log a line, unless there was one just before."""
        now_s = time.monotonic()
        if now_s >= self._next_s:
            logger.info("%s: %.0f s so far", self._what, now_s - self._started_s)
            self._next_s = now_s + _LINE_EVERY_S
