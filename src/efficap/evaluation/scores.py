"""BLEU, METEOR, ROUGE-L and CIDEr of a whole split, by pycocoevalcap's scorers.

All are corpus statistics: score the gathered captions of a split once, never the mean of batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from efficap.errors import InputError, first_of
from efficap.evaluation import java
from efficap.evaluation.java import check_java
from efficap.evaluation.sums import Floats, Parts, meteor

__all__ = [
    "ALL_METRICS",
    "PictureScores",
    "Scores",
    "check_java",
    "check_metrics",
    "cider_per_image",
    "distinct_share",
    "picture_scores",
    "score_captions",
    "score_split",
]

Scores = dict[str, float | int | str | None]
Tokenized = dict[str, list[str]]  # image id -> tokenized captions
Values = tuple[list[float], Floats]  # the scores of a metric, and (N, C) what each picture adds


class PictureScores(NamedTuple):
    """A picture's part in the scores of its split.

    Attributes:
        cider: 0 to 10, by document frequencies of the split; their mean is the split's.
        bleu: ten counts, whose sums over a split give its BLEU: words of the caption and of the reference closest in
            length, n-grams of 1 to 4 words in the caption, and those of them that a reference has.
        meteor: 0 to 1; the split's is no mean of them. None where it was not computed.
        rouge_l: 0 to 1; their mean is the split's. None where it was not computed.
    """

    cider: float
    bleu: tuple[int, ...]
    meteor: float | None = None
    rouge_l: float | None = None


def score_captions(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: Sequence[str] | None = None,
) -> Scores:
    """Score one caption for each image against all of its references.

    BLEU: Papineni et al. 2002, https://aclanthology.org/P02-1040. METEOR: Denkowski and Lavie 2014,
    https://aclanthology.org/W14-3348. ROUGE-L: Lin 2004, https://aclanthology.org/W04-1013. CIDEr, in its
    variant CIDEr-D: Vedantam et al. 2015, https://arxiv.org/abs/1411.5726.

    Args:
        predictions: image id -> caption; an empty caption is scored as one.
        references: image id -> reference texts, at least one; blank ones are left out. CIDEr takes its
            document frequencies from them: the scores of a subset and of the split cannot be compared.
        metrics: of ``BLEU``, ``METEOR``, ``ROUGE-L``, ``CIDEr``; None for all. METEOR takes 6 s to start.

    Returns:
        A flat dict in the order of `metrics`: ``BLEU-1`` to ``BLEU-4``, ``METEOR``, ``ROUGE-L`` from 0 to 1,
        ``CIDEr`` from 0 to 10 (papers print all of them times 100). A metric that fails leaves the others
        alone: its value is None, and ``METEOR_error`` (or ``BLEU_error``, …) says why in one line.

    Raises:
        InputError: no images, unequal ids, an image without a reference, an unknown metric, no Java runtime.
    """
    return score_split(predictions, references, metrics=metrics)[0]


def score_split(
    predictions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    *,
    metrics: Sequence[str] | None = None,
) -> tuple[Scores, Parts]:
    """What `score_captions` returns, and of each metric that did not fail what each picture, in turn, adds to it."""
    names = list(ALL_METRICS if metrics is None else metrics)
    check_metrics(names)
    _check_ids(predictions, references)
    check_java()
    try:
        predicted, expected = tokenized(predictions, references)
    except (OSError, RuntimeError) as error:  # a long training must outlive this, too
        return {key: value for name in names for key, value in failure(name, error).items()}, {}
    return score_tokens(predicted, expected, names)


def score_tokens(predicted: Tokenized, expected: Tokenized, names: Sequence[str]) -> tuple[Scores, Parts]:
    """The same of what `tokenized` returned, or of some pictures of it."""
    scores: Scores = {}
    parts: Parts = {}
    for name in names:
        keys, compute = _METRICS[name]
        try:
            values, part = compute(predicted, expected)
            if not all(math.isfinite(value) for value in values):
                raise ArithmeticError(f"not a finite number: {values}")
        except Exception as error:  # whatever ails one scorer is recorded, and the others stand
            scores |= failure(name, error)
        else:
            scores |= dict(zip(keys, values, strict=True))
            parts[name] = part
    return scores, parts


def check_metrics(names: Sequence[str]) -> None:
    """Raises InputError where one of `names` is no metric."""
    for name in names:
        if name not in _METRICS:
            raise InputError(f"metric {name!r} is none of {', '.join(ALL_METRICS)}")


def cider_per_image(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """CIDEr of each image (0 to 10); their mean is the corpus' score.

    Raises:
        InputError: as `score_captions`.
        RuntimeError: the tokenizer failed.
    """
    _check_ids(predictions, references)
    _, cider = _cider(*tokenized(predictions, references))
    return dict(zip(predictions, cider[:, 0].tolist(), strict=True))


def picture_scores(image_ids: Sequence[str], parts: Parts) -> dict[str, PictureScores]:
    """By image what `score_split` found; nothing unless both CIDEr and BLEU are among it."""
    if not parts.keys() >= {"CIDEr", "BLEU"}:
        return {}
    nothing = [None] * len(image_ids)
    rows = zip(
        parts["CIDEr"][:, 0].tolist(),
        (tuple(map(int, counts)) for counts in parts["BLEU"]),
        meteor(parts["METEOR"]).tolist() if "METEOR" in parts else nothing,
        parts["ROUGE-L"][:, 0].tolist() if "ROUGE-L" in parts else nothing,
        strict=True,
    )
    return {image_id: PictureScores(*row) for image_id, row in zip(image_ids, rows, strict=True)}


def distinct_share(captions: Sequence[str]) -> float:
    """The share of distinct captions, 0 to 1, white space aside: near 0, every picture gets the same one.

    Raises:
        InputError: no captions.
    """
    if not captions:
        raise InputError("there are no captions to count")
    return len({java.one_line(caption) for caption in captions}) / len(captions)


def _check_ids(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    if not predictions and not references:
        raise InputError("there is nothing to score: no predictions and no references")
    for wrong, what in (
        ([i for i in references if i not in predictions], "have references but no predicted caption"),
        ([i for i in predictions if i not in references], "have a predicted caption but no references"),
        ([i for i in references if not any(map(java.one_line, references[i]))], "have no reference text"),
    ):
        if wrong:
            raise InputError(
                f"{len(wrong)} of {len(references.keys() | predictions.keys())} images {what}: "
                f"{first_of(map(repr, wrong))}; score predictions and references of the same split"
            )


def tokenized(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[Tokenized, Tokenized]:
    """Predictions and references in the same order of ids; one start of Java for both."""
    texts = [predictions[i] for i in predictions]
    kept = {i: [text for text in references[i] if java.one_line(text)] for i in predictions}
    tokens = iter(java.tokenize(texts + [text for i in kept for text in kept[i]]))
    predicted = {i: [next(tokens)] for i in predictions}
    return predicted, {i: [next(tokens) for _ in kept[i]] for i in kept}


def failure(name: str, error: Exception) -> Scores:
    """What stands in place of a metric's scores: None, and why."""
    # A RuntimeError from java.py says it all; another error's text may be no more than a key.
    why = java.one_line(str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}")
    return {**dict.fromkeys(_METRICS[name][0]), f"{name}_error": why}


def _bleu(predicted: Tokenized, expected: Tokenized) -> Values:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

    scores, _ = Bleu(4).compute_score(expected, predicted, verbose=0)
    cooked = [cook_test(predicted[i][0], cook_refs(expected[i]), "closest") for i in predicted]
    counts = [[c["testlen"], c["reflen"], *c["guess"], *c["correct"]] for c in cooked]
    return [float(score) for score in scores], np.array(counts, np.float64)


def _meteor(predicted: Tokenized, expected: Tokenized) -> Values:
    score, statistics = java.meteor([captions[0] for captions in predicted.values()], list(expected.values()))
    return [score], statistics


def _rouge(predicted: Tokenized, expected: Tokenized) -> Values:
    from pycocoevalcap.rouge.rouge import Rouge

    return _mean_of(*Rouge().compute_score(expected, predicted))


def _cider(predicted: Tokenized, expected: Tokenized) -> Values:
    from pycocoevalcap.cider.cider import Cider

    return _mean_of(*Cider().compute_score(expected, predicted))


def _mean_of(score: float, of_pictures: Sequence[float]) -> Values:
    return [float(score)], np.asarray(of_pictures, np.float64)[:, None]


# Name -> the keys of its scores, and the function that gives their values and what each picture adds.
_METRICS: dict[str, tuple[tuple[str, ...], Callable[[Tokenized, Tokenized], Values]]] = {
    "BLEU": (("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), _bleu),
    "METEOR": (("METEOR",), _meteor),
    "ROUGE-L": (("ROUGE-L",), _rouge),
    "CIDEr": (("CIDEr",), _cider),
}
ALL_METRICS = tuple(_METRICS)
