"""Which pictures of a split its page shows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from efficap.evaluation.pictures import PictureRecord

SEED = 0  # the random pictures of a split are the same for every run, so that pages can be compared


@dataclass(frozen=True, slots=True)
class Selection:
    """Pictures by their number in the split.

    Attributes:
        numbers: all that are shown, in the split's order.
        ranked: those that have a CIDEr, by descending CIDEr.
        random: those that were drawn without regard to it, in the order of the draw.
    """

    numbers: list[int]
    ranked: list[int]
    random: list[int]


def select(records: Sequence[PictureRecord], limit: int) -> Selection:
    """All pictures, or of a larger split at most `limit`: a third each of the best, the worst and random ones.

    Args:
        records: of the whole split, at least one.
        limit: at least 1.
    """
    numbers = list(range(len(records)))
    ciders = {number: record.scores.cider for number, record in enumerate(records) if record.scores}
    ranked = sorted(ciders, key=lambda number: -ciders[number])
    drawn = random.Random(SEED).sample(numbers, len(numbers))
    if limit < len(records):
        part = limit // 3 if ranked else 0
        drawn = drawn[: limit - 2 * part]
        kept = {*ranked[:part], *ranked[len(ranked) - part :], *drawn}
        numbers, ranked = sorted(kept), [number for number in ranked if number in kept]
    return Selection(numbers, ranked, drawn)
