"""CIDEr-D of sequences of token ids: a reward for training, in a few milliseconds a batch.

B images, n candidates and at most K references of each, S sequences, E n-grams of these (of each sequence once), U
n-grams that a candidate and a reference of an image share.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ORDERS = 4  # n-grams of 1 … 4 tokens
SIGMA = 6.0  # tokens, of the Gaussian over differences of length
SCALE = 10.0

_DOCUMENTS_AT_ONCE = 10_000
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd: a product modulo 2**64 can be undone, so nothing is lost

Ids = Sequence[int]
Keys = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Floats = NDArray[np.float64]


class CiderD:
    """CIDEr-D (Vedantam et al. 2015, https://arxiv.org/abs/1411.5726) with fixed document frequencies.

    The arithmetic is pycocoevalcap's, on ids in place of words. EOS is a token like any other: where all references
    have theirs, a candidate that does not end misses the n-grams with it. BOS says nothing and is better left out.

    N-grams are told apart by 64 bits: the probability that any two of ten million share theirs is 3e-6.

    Args:
        documents: the sequences of each document. An n-gram's document frequency is the number of documents that have
            it; pycocoevalcap takes the references of an image for one document.

    Raises:
        ValueError: there is no document.
    """

    def __init__(self, documents: Iterable[Sequence[Ids]]) -> None:
        documents = iter(documents)
        size, keys, counts = 0, np.empty(0, np.uint64), np.empty(0, np.int64)
        while part := list(itertools.islice(documents, _DOCUMENTS_AT_ONCE)):
            size += len(part)
            document = np.repeat(np.arange(len(part)), [len(sequences) for sequences in part])
            sequence, new, _ = _ngrams(list(itertools.chain.from_iterable(part)))
            distinct, kind = np.unique(new, return_inverse=True)
            once = np.unique(document[sequence] * len(distinct) + kind)  # in each document
            new = distinct[once % max(1, len(distinct))]
            keys, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
            counts = np.bincount(place, np.append(counts, np.ones(len(new))), len(keys)).astype(np.int64)
        if not size:
            raise ValueError("CIDEr-D needs a document to take document frequencies from")
        self._unseen = float(np.log(size))  # idf of an n-gram that no document has: as if one had it
        self._keys = np.append(keys, np.uint64(2**64 - 1))  # so that every search ends at a place
        self._idf = np.append(self._unseen - np.log(counts), self._unseen)

    def __deepcopy__(self, memo: dict[int, Any]) -> CiderD:
        return self  # it never changes, and it is large

    def __call__(self, candidates: Sequence[Sequence[Ids]], references: Sequence[Sequence[Ids]]) -> Floats:
        """Score n candidates of each image against all references of that image.

        Args:
            candidates: B times n sequences.
            references: B times any number of sequences; an image without any scores 0.

        Returns:
            (B, n) float64, 0 … 10.
        """
        images, n, most = len(candidates), len(candidates[0]), max(1, *map(len, references))
        rows = n + most  # of an image: its candidates, then its references
        sequences = [ids for group in (candidates, references) for of_image in group for ids in of_image]
        row = np.array(
            [b * rows + c for b in range(images) for c in range(n)]
            + [b * rows + n + k for b in range(images) for k in range(len(references[b]))]
        )  # (S,)
        weights = self._weights(sequences, row)

        similar = _clipped_products(weights, images, n, most)  # (B, n, K, ORDERS)
        norms = np.bincount(weights.row * ORDERS + weights.order, weights.value**2, images * rows * ORDERS)
        norms = np.sqrt(norms).reshape(images, rows, ORDERS)
        norms = norms[:, :n, None] * norms[:, None, n:]  # (B, n, K, ORDERS)
        similar = np.divide(similar, norms, out=np.zeros_like(similar), where=norms > 0)

        length = np.zeros(images * rows)
        length[row] = [max(0, len(ids) - 1) for ids in sequences]  # pycocoevalcap counts the bigrams
        length = length.reshape(images, rows)
        delta = length[:, :n, None] - length[:, None, n:]  # (B, n, K)
        scores = similar.mean(axis=-1) * np.exp(-(delta**2) / (2 * SIGMA**2))
        counts = np.array([[max(1, len(of_image))] for of_image in references])
        return np.asarray(SCALE * scores.sum(axis=-1) / counts)

    def _weights(self, sequences: Sequence[Ids], row: Numbers) -> _Weights:
        sequence, keys, order = _ngrams(sequences)
        distinct, first, kind = np.unique(keys, return_index=True, return_inverse=True)
        place = np.searchsorted(self._keys, distinct)
        idf = np.where(self._keys[place] == distinct, self._idf[place], self._unseen)
        entries, count = np.unique(row[sequence] * len(distinct) + kind, return_counts=True)
        row, kind = np.divmod(entries, max(1, len(distinct)))
        return _Weights(row, kind, order[first][kind], count * idf[kind])


class _Weights(NamedTuple):
    """The tf-idf of each n-gram of each sequence, all (E,)."""

    row: Numbers  # of the sequence
    kind: Numbers  # which n-gram it is
    order: Numbers  # its tokens - 1
    value: Floats


def _clipped_products(weights: _Weights, images: int, n: int, most: int) -> Floats:
    """(B, n, K, ORDERS) sums over n-grams of min(candidate, reference) * reference."""
    rows, kinds = n + most, int(weights.kind.max(initial=-1)) + 1
    ngram = weights.row // rows * kinds + weights.kind  # of an image
    has = np.zeros((2, images * kinds), bool)
    has[(weights.row % rows < n).astype(int), ngram] = True
    in_both = has[0] & has[1]
    shared, kept = np.flatnonzero(in_both), np.flatnonzero(in_both[ngram])
    image, order = weights.row[kept] // rows, weights.order[kept]
    starts = np.searchsorted(shared, kinds * np.arange(images))
    column = np.searchsorted(shared, ngram[kept]) - starts[image]  # among those of its image
    width = int(column.max(initial=-1)) + 1  # U
    vectors, one_hot = np.zeros((images * rows, width)), np.zeros((images, width, ORDERS))
    vectors[weights.row[kept], column] = weights.value[kept]
    one_hot[image, column, order] = 1.0
    vectors = vectors.reshape(images, rows, width)
    ours, theirs = vectors[:, :n, None], vectors[:, None, n:]  # (B, n, 1, U), (B, 1, K, U)
    clipped = np.minimum(ours, theirs) * theirs  # (B, n, K, U)
    return (clipped.reshape(images, n * most, width) @ one_hot).reshape(images, n, most, ORDERS)


def _ngrams(sequences: Sequence[Ids]) -> tuple[Numbers, Keys, Numbers]:
    """Sequence, key and tokens - 1 of every n-gram; one that a sequence has twice comes twice."""
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences))
    ids = np.fromiter(itertools.chain.from_iterable(sequences), np.uint64, lengths.sum()) + np.uint64(1)
    owner = np.repeat(np.arange(len(sequences)), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(ids))  # tokens to the sequence's end
    sequence, keys, orders = [], [], []
    key = np.zeros(len(ids) + 1, np.uint64)
    for order in range(ORDERS):
        key = key[:-1] * _MULTIPLIER + ids[order:]
        key ^= key >> np.uint64(29)
        inside = (left > order)[: len(key)]
        sequence.append(owner[: len(key)][inside])
        keys.append(key[inside])
        orders.append(np.full(len(keys[-1]), order))
    return np.concatenate(sequence), np.concatenate(keys), np.concatenate(orders)
