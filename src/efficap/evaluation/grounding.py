"""Whether captions speak of their pictures: how varied they are, what they repeat, copy and make up, and a verdict.

A word is a run of letters and digits, lower-cased; with apostrophes inside.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from efficap.evaluation.scores import distinct_share

ORDER = 3  # words of the n-grams whose repetition is counted
SEED = 0  # of the exchange of pictures, which has no other use
SURE = 1.96  # standard errors on either side of a mean, for 95 %
LEAST_LOSS_GAP = 0.05  # nats a token: another picture makes a word 5 % less likely
LEAST_CIDER_GAP = 0.05  # 5 as papers print it

# Vowel signs, tones and accents of their own, which Python counts among no words, and the joiners between letters.
_MARKS = "".join(chr(c) for c in range(0x300, 0x1EB00) if unicodedata.category(chr(c))[0] == "M")
_LETTERS = rf"(?:[^\W_][{_MARKS}\u200c\u200d]*)+"
_WORD = re.compile(rf"{_LETTERS}(?:['’]{_LETTERS})*")  # noqa: RUF001

Checks = dict[str, Any]  # as it stands in scores.json


class Gap(NamedTuple):
    """How much a score owes to the right picture, in the mean over pictures, and the standard error of that mean."""

    mean: float
    error: float

    @classmethod
    def of(cls, differences: Sequence[float]) -> Gap:
        """Of at least two pictures."""
        mean = math.fsum(differences) / len(differences)
        variance = math.fsum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
        return cls(mean, math.sqrt(variance / len(differences)))

    def verdict(self, least: float) -> str:
        """``yes`` where it is more than `least` beyond chance, ``no`` where it is less, else ``unsure``."""
        if self.mean - SURE * self.error > least:
            return "yes"
        return "no" if self.mean + SURE * self.error < least else "unsure"


def exchanged(image_ids: Sequence[str]) -> dict[str, str]:
    """For each of at least two pictures another one, by chance, for the order of a table may repeat itself.

    All are exchanged in a ring, so that none keeps its own; the same pictures always in the same way.
    """
    ring = sorted(image_ids)
    random.Random(SEED).shuffle(ring)
    return dict(zip(ring, ring[1:] + ring[:1], strict=True))


def words_of(caption: str) -> list[str]:
    return _WORD.findall(caption.lower())


def describe(captions: Sequence[str]) -> Checks:
    """How varied captions are.

    Returns:
        ``distinct``, the share of distinct captions; ``vocabulary``, the number of distinct words; ``mean_words`` of a
        caption; ``repetition``, the share of n-grams of three words that stand in the same caption before (seq-rep-n of
        Welleck et al. 2020, https://arxiv.org/abs/1908.04319).
    """
    words = [words_of(caption) for caption in captions]
    grams = [[tuple(of[i : i + ORDER]) for i in range(len(of) - ORDER + 1)] for of in words]
    total = sum(map(len, grams))
    return {
        "distinct": distinct_share(captions),
        "vocabulary": len({word for of in words for word in of}),
        "mean_words": sum(map(len, words)) / len(words),
        "repetition": sum(len(of) - len(set(of)) for of in grams) / total if total else 0.0,
    }


def against_references(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> Checks:
    """`describe` of the captions and, as ``reference_…``, of the first reference of each picture.

    One reference of each picture, so that both are as many: with five times as many captions people's vocabulary would
    be larger for that alone.
    """
    firsts = [next(filter(words_of, references[i]), "") for i in predictions]
    checks = describe(list(predictions.values()))
    if any(firsts):
        checks |= {f"reference_{name}": value for name, value in describe([t for t in firsts if t]).items()}
    return checks


def against_training(captions: Iterable[str], training: Iterable[str]) -> Checks:
    """What the captions have from training.

    Args:
        captions: what the model wrote.
        training: the captions it learned from; taken one by one.

    Returns:
        ``copied``, the share of captions that stand among them word for word; ``novel_words``, the share of the
        distinct words that none of them has.
    """
    ours = [tuple(words_of(caption)) for caption in captions]
    asked, unknown = set(ours), {word for caption in ours for word in caption}
    vocabulary, found = len(unknown), set()
    for caption in training:
        words = tuple(words_of(caption))
        unknown.difference_update(words)
        if words in asked:
            found.add(words)
    return {
        "copied": sum(caption in found for caption in ours) / len(ours),
        "novel_words": len(unknown) / max(1, vocabulary),
    }


def verdict(loss: Gap | None, cider: Gap | None) -> str | None:
    """Whether the model looks at the picture: ``yes``, ``no`` or ``unsure``; None where neither gap is known.

    A gap is judged beyond chance, by its standard error. Where one of the two cannot tell, the other one does; where
    they contradict each other, as with a model that knows its pictures and says the same of all, it is unsure.
    """
    if loss is None and cider is None:
        return None
    said = {
        gap.verdict(least)
        for gap, least in ((loss, LEAST_LOSS_GAP), (cider, LEAST_CIDER_GAP))
        if gap is not None
    } - {"unsure"}
    return said.pop() if len(said) == 1 else "unsure"


def verdict_line(checks: Checks) -> str:
    """``looks at the picture: yes (loss gap 1.31, CIDEr gap 4.62)``; empty where there is no verdict."""
    if "verdict" not in checks:
        return ""
    gaps = [
        f"{name} gap {round(checks[key], 2) + 0.0:.2f}"  # no -0.00
        for name, key in (("loss", "loss_gap"), ("CIDEr", "CIDEr_gap"))
        if key in checks
    ]
    return f"looks at the picture: {checks['verdict']} ({', '.join(gaps)})"


def checks_line(checks: Checks) -> str:
    """The other checks on one line, each beside that of the references."""
    forms = {
        "distinct": ("distinct", "{:.0%}"),
        "vocabulary": ("words", "{:,}"),
        "mean_words": ("length", "{:.1f}"),
        "repetition": ("repeated", "{:.1%}"),
        "copied": ("copied from training", "{:.0%}"),
        "novel_words": ("words not in training", "{:.1%}"),
        "hallucinated": ("objects not there", "{:.1%}"),
    }
    parts = []
    for key, (name, form) in forms.items():
        if key in checks:
            beside = f"reference_{key}"
            people = f" (people {form.format(checks[beside])})" if beside in checks else ""
            parts.append(f"{name} {form.format(checks[key])}{people}")
    return "captions: " + ", ".join(parts)
