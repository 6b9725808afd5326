"""Numbers sorted into a few bins, for the eye."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_BINS = 24


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values lie in each bin.

    Attributes:
        title: what is counted, with its unit.
        least, median, most: of the values.
        edges: one more than there are bins; a bin holds its lower edge, the last bin all that is beyond, too.
        counts: one for each bin.
    """

    title: str
    least: float
    median: float
    most: float
    edges: list[float]
    counts: list[int]


def histogram(title: str, values: NDArray[np.float64], weights: NDArray[np.int64]) -> Histogram | None:
    """Bins of a round width over all but the largest half per cent of the values; None where there are none.

    Args:
        values: any numbers, ascending.
        weights: how often each occurs, at least once.
    """
    if not len(values):
        return None
    share = np.cumsum(weights) / weights.sum()  # ends at 1.0
    low, high = float(values[0]), float(values[int(np.searchsorted(share, 0.995))])
    whole = bool((values == np.floor(values)).all())
    width = _round_width((high - low) / MOST_BINS, whole)
    first = math.floor(low / width)
    bins = math.floor(high / width) - first + 1
    which = np.clip(np.floor(values / width + 1e-9).astype(np.int64) - first, 0, bins - 1)
    counts = np.bincount(which, weights, minlength=bins).astype(np.int64)
    edges = [round((first + number) * width, 6) for number in range(bins + 1)]
    median = float(values[int(np.searchsorted(share, 0.5))])
    return Histogram(title, low, median, float(values[-1]), edges, counts.tolist())


def _round_width(least: float, whole: bool) -> float:
    """The next of 1, 2, 5 times a power of ten; whole numbers get no narrower bins than 1."""
    if least <= 0:
        return 1.0 if whole else 0.1
    power = 10.0 ** math.floor(math.log10(least))
    width = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return max(width, 1.0) if whole else width
