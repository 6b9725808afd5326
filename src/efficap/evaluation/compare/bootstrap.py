"""Whether a difference between captioners is chance: the paired bootstrap over the pictures of a split.

N pictures, S runs, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from efficap.evaluation.scores import BLEU_COUNTS, PictureScores

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
_AT_ONCE = 2_000_000  # pictures drawn at once: some 50 MB
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's, so that a caption without a match gives 0 and no error


@dataclass(frozen=True)
class Resampled:
    """Scores of each run in each resample, and on the split as it is.

    Attributes:
        cider, bleu4: (R, S).
        cider_of_all, bleu4_of_all: (S,).
    """

    cider: Floats
    bleu4: Floats
    cider_of_all: Floats
    bleu4_of_all: Floats


def resample(
    runs: Sequence[Sequence[PictureScores]],
    *,
    resamples: int,
    seed: int,
    advance: Callable[[int], object] = lambda done: None,
) -> Resampled:
    """Score S runs on R resamples of the N pictures, drawn with replacement, the same ones for all runs.

    Koehn 2004, "Statistical significance tests for machine translation evaluation",
    https://aclanthology.org/W04-3250, for scores of image captions. CIDEr's document frequencies stay those of the
    split, so that the score of a resample is the mean over its pictures. BLEU-4 is computed anew from the sums of its
    counts. What is resampled is the pictures, never the runs: how a model's score varies with its seed is not in it.

    Args:
        runs: of each the scores of all pictures, in the same order.
        resamples: R.
        seed: of the drawing.
        advance: is told the number of resamples done, time and again.
    """
    n, s = len(runs[0]), len(runs)
    cider = np.array([[picture.cider for picture in run] for run in runs]).T  # (N, S)
    counts = np.array([[picture.bleu for picture in run] for run in runs], np.float64)  # (S, N, 10)
    columns = np.concatenate([cider, counts.transpose(1, 0, 2).reshape(n, -1)], axis=1)  # (N, 11 S)
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    sums = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)  # that a picture is drawn
        sums[start : start + size] = times.astype(np.float64) @ columns
        advance(size)
    everything = columns.sum(axis=0)
    return Resampled(
        cider=sums[:, :s] / n,
        bleu4=bleu4(sums[:, s:].reshape(resamples, s, BLEU_COUNTS)),
        cider_of_all=everything[:s] / n,
        bleu4_of_all=bleu4(everything[s:].reshape(s, BLEU_COUNTS)),
    )


def bleu4(counts: Floats) -> Floats:
    """BLEU-4 (Papineni et al. 2002, https://aclanthology.org/P02-1040) of summed counts, as pycocoevalcap has it.

    Args:
        counts: (…, 10), sums of `PictureScores.bleu`.

    Returns:
        (…), 0 to 1.
    """
    words, closest, guesses, matches = counts[..., 0], counts[..., 1], counts[..., 2:6], counts[..., 6:]
    precision = np.prod((matches + _TINY) / (guesses + _SMALL), axis=-1) ** 0.25
    ratio = (words + _TINY) / (closest + _SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio)))


def interval(scores: Floats) -> tuple[float, float]:
    """The bounds between which the middle 95 % of the resamples' scores lie, (R,) -> two numbers."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, [outside, 1 - outside])
    return float(low), float(high)


def p_value(differences: Floats) -> float:
    """Two-sided p-value of differences (R,) between two captioners on the same resamples.

    Twice the share of resamples in which the difference has the rarer sign, ties counted for both, at most 1. One is
    added to the counts, for the split as it is belongs to them (Davison and Hinkley 1997, section 4.2): the least
    value is 2 / (R + 1).
    """
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2.0 * (1.0 + float(rarer)) / (len(differences) + 1.0))
