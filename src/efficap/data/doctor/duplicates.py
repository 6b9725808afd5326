"""Pictures that occur more than once, found without comparing each with each."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from efficap.data.doctor.fingerprint import Looks

DISTANCE = 4  # bits of 63 that may differ: re-encoding and resizing change 0 to 4, other photographs mostly 10 and more
COLOUR_DISTANCE = 16  # grey levels, at most, in any of 6 x 6 cells: re-encoding and resizing change up to 6
BANDS = DISTANCE + 2  # of bits: at least two of them are then free of differences
CROWD = 300  # neighbours in a band that each is compared with; a group of more hangs together all the same

_Numbers = NDArray[np.int64]


def find_duplicates(looks: Looks) -> list[list[int]]:
    """Groups of two or more pictures that look the same, each group and all groups in order.

    Pictures with equal pixels are one. Others must be near in the hash's bits, and in colour as well: drawings of a
    shape in two colours have the same hash. Those without contrast are compared by their pixels alone.

    Near hashes agree in at least two of six bands of bits (the pigeonhole principle, as in Manku et al., Detecting
    Near-Duplicates for Web Crawling, WWW 2007), so only those with an equal pair of bands are compared.
    """
    groups = _Groups(len(looks))
    _, representative, inverse = np.unique(looks["digest"], return_index=True, return_inverse=True)
    groups.join(np.arange(len(looks)), representative[inverse])
    candidates = np.sort(representative[~looks["flat"][representative]])
    hashes, colours = looks["hash"][candidates], looks["colours"][candidates]
    for a, b in _near(hashes):
        new = groups.apart(candidates[a], candidates[b])
        a, b = a[new], b[new]
        difference = np.abs(colours[a].astype(np.int16) - colours[b]).max(axis=(1, 2, 3), initial=0)
        same = difference <= COLOUR_DISTANCE
        groups.join(candidates[a[same]], candidates[b[same]])
    return groups.of_two_or_more()


def _near(hashes: NDArray[np.uint64]) -> Iterator[tuple[_Numbers, _Numbers]]:
    """Pairs of numbers whose hashes differ in at most `DISTANCE` bits; a pair may come several times."""
    # Every sixth bit to a band: neighbouring frequencies go together, and would crowd a band of their own.
    bits = np.uint64(1) << np.arange(64, dtype=np.uint64)
    masks = [np.bitwise_or.reduce(bits[band::BANDS]) for band in range(BANDS)]
    for one, other in combinations(masks, 2):
        keys = hashes & (one | other)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        left = np.arange(len(keys))
        for step in range(1, CROWD + 1):
            left = left[left + step < len(keys)]
            left = left[keys[left] == keys[left + step]]
            if not len(left):
                break
            a, b = order[left], order[left + step]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= DISTANCE
            yield a[near], b[near]


class _Groups:
    """A disjoint-set forest; the smallest number stands for its set."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size)

    def apart(self, one: _Numbers, other: _Numbers) -> NDArray[np.bool_]:
        """Which of the pairs are not in one set yet."""
        return np.asarray(self._roots(one) != self._roots(other))

    def join(self, one: _Numbers, other: _Numbers) -> None:
        """Unite the sets of each pair."""
        new = self.apart(one, other)
        for a, b in zip(one[new].tolist(), other[new].tolist(), strict=True):
            a, b = self._root(a), self._root(b)
            self._parent[max(a, b)] = min(a, b)

    def of_two_or_more(self) -> list[list[int]]:
        members: dict[int, list[int]] = {}
        for number in np.flatnonzero(self._parent != np.arange(len(self._parent))).tolist():
            root = self._root(number)
            members.setdefault(root, [root]).append(number)
        return [members[root] for root in sorted(members)]

    def _root(self, number: int) -> int:
        while (parent := int(self._parent[number])) != number:
            self._parent[number] = self._parent[parent]  # halves the way for the next time
            number = parent
        return number

    def _roots(self, numbers: _Numbers) -> _Numbers:
        roots = self._parent[numbers]
        while ((above := self._parent[roots]) != roots).any():
            roots = above
        self._parent[numbers] = roots
        return roots
