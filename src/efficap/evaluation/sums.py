"""Scores of any set of pictures, from the sums of what each of them adds.

BLEU and METEOR are no means over pictures: both add up counts first. CIDEr and ROUGE-L are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLEU_COUNTS, METEOR_COUNTS = 10, 23  # of a picture

Floats = NDArray[np.float64]
# Metric -> (N, C), of each picture what it adds: the counts of BLEU and METEOR, else its score.
Parts = dict[str, Floats]

_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's, so that a caption without a match gives 0 and no error
# METEOR 1.5's for English: the weights of exact, stem, synonym and paraphrase matches, alpha, beta, gamma, delta.
_MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def scores_of_sums(metric: str, sums: Floats, pictures: int) -> dict[str, Floats]:
    """The scores that a metric gives of some pictures.

    Args:
        metric: ``BLEU``, ``METEOR``, ``ROUGE-L`` or ``CIDEr``.
        sums: (…, C), of their parts.
        pictures: how many there are.

    Returns:
        Name of the score, such as ``BLEU-4`` -> (…).
    """
    if metric == "BLEU":
        return {f"BLEU-{order + 1}": score for order, score in enumerate(np.moveaxis(bleu(sums), -1, 0))}
    return {metric: meteor(sums) if metric == "METEOR" else sums[..., 0] / pictures}


def bleu(counts: Floats) -> Floats:
    """BLEU-1 to 4 (Papineni et al. 2002, https://aclanthology.org/P02-1040) of summed counts, as pycocoevalcap has it.

    Args:
        counts: (…, 10): words of the captions and of the references closest in length, n-grams of 1 to 4 words in the
            captions, and those of them that a reference has.

    Returns:
        (…, 4), 0 to 1.
    """
    words, closest, guesses, matches = counts[..., 0], counts[..., 1], counts[..., 2:6], counts[..., 6:]
    precision = np.cumprod((matches + _TINY) / (guesses + _SMALL), axis=-1) ** (1 / np.arange(1, 5))
    ratio = (words + _TINY) / (closest + _SMALL)
    return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / ratio))[..., None])


def meteor(statistics: Floats) -> Floats:
    """METEOR (Denkowski and Lavie 2014, https://aclanthology.org/W14-3348) of summed statistics, as version 1.5 has it.

    Args:
        statistics: (…, 23): words of caption and reference, function words among them; for each of four matchers the
            content words matched in caption and reference, then the function words; chunks; words matched in both.

    Returns:
        (…), 0 to 1.
    """
    words, functions = statistics[..., 0:2], statistics[..., 2:4]
    by_matcher = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 2, 2)  # content or function, side
    content, function = np.moveaxis(
        (_MATCHERS[:, None, None] * by_matcher).sum(axis=-3), -2, 0
    )  # (…, 2) each
    matched = _DELTA * content + (1 - _DELTA) * function
    share = _ratio(matched, _DELTA * (words - functions) + (1 - _DELTA) * functions)
    precision, recall = share[..., 0], share[..., 1]
    mean = _ratio(precision * recall, _ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _ratio(statistics[..., 20], statistics[..., 21:23].mean(axis=-1))
    return np.asarray(mean * (1 - _GAMMA * fragmentation**_BETA))


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
