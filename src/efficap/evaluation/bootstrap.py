"""How much a score owes to the pictures of a split, and whether a difference is chance: the bootstrap over pictures.

N pictures, S runs, R resamples, C numbers of each picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from efficap.evaluation.scores import PictureScores
from efficap.evaluation.sums import BLEU_COUNTS, Floats, Parts, bleu, scores_of_sums

CONFIDENCE = 0.95
_AT_ONCE = 2_000_000  # pictures drawn at once: some 50 MB


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
    sums = resampled_sums(columns, resamples=resamples, seed=seed, advance=advance)
    everything = columns.sum(axis=0)
    return Resampled(
        cider=sums[:, :s] / n,
        bleu4=bleu(sums[:, s:].reshape(resamples, s, BLEU_COUNTS))[..., 3],
        cider_of_all=everything[:s] / n,
        bleu4_of_all=bleu(everything[s:].reshape(s, BLEU_COUNTS))[..., 3],
    )


def resampled_sums(
    columns: Floats, *, resamples: int, seed: int, advance: Callable[[int], object] = lambda done: None
) -> Floats:
    """Sums over R resamples of the N pictures, (N, C) -> (R, C); the same resamples for the same N, R and seed."""
    n = len(columns)
    rng = np.random.default_rng(seed)
    at_once = max(1, _AT_ONCE // n)
    sums = np.empty((resamples, columns.shape[1]))
    for start in range(0, resamples, at_once):
        size = min(at_once, resamples - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)  # that a picture is drawn
        sums[start : start + size] = times.astype(np.float64) @ columns
        advance(size)
    return sums


def score_intervals(parts: Parts, *, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """The 95 % interval of each score of one captioner, over R resamples of the N pictures.

    Args:
        parts: of each metric what the pictures add.
        resamples: R.
        seed: of the drawing.
    """
    if not parts:
        return {}
    n = len(next(iter(parts.values())))
    sums = resampled_sums(np.concatenate(list(parts.values()), axis=1), resamples=resamples, seed=seed)
    ends = np.cumsum([part.shape[1] for part in parts.values()])
    of_metric = dict(zip(parts, np.split(sums, ends[:-1], axis=1), strict=True))
    return {
        name: interval(scores)
        for metric, own in of_metric.items()
        for name, scores in scores_of_sums(metric, own, n).items()
    }


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
