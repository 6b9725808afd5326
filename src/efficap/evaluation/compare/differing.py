"""The pictures on which two captioners differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from efficap.evaluation.compare.groups import Group
from efficap.evaluation.compare.standings import Standings
from efficap.evaluation.pictures import PictureRecord


@dataclass(frozen=True)
class Differing:
    """Two models and what they wrote about some pictures; of a model with several seeds, its first run.

    Attributes:
        first, second: the models.
        pictures: as the first's and the second's run describe them, the largest difference of CIDEr first.
    """

    first: Group
    second: Group
    pictures: list[tuple[PictureRecord, PictureRecord]]


def differing_pictures(standings: Standings, between: Sequence[str] | None, count: int) -> Differing | None:
    """`count` pictures whose CIDEr differs most, half of them in favour of each model where there are as many.

    Args:
        standings: of the split.
        between: names of two models; None takes the smallest and the largest, or where these have equally many
            parameters those of the least and the greatest CIDEr.
        count: pictures.

    Returns:
        None where these two, or any two, have no scores of each picture of this split.
    """
    ready = {group.name: group for pair in standings.pairs for group in (pair.first, pair.second)}
    if len(ready) < 2:
        return None
    if between is None:
        first, second = _extremes(standings, list(ready.values()))
    else:
        if not ready.keys() >= set(between):
            return None
        first, second = (ready[name] for name in between)
    pictures = [
        list(group.evaluated(standings.split)[0].evaluations[standings.split].pictures)
        for group in (first, second)
    ]
    gains = [(_cider(other) - _cider(one), one, other) for one, other in zip(*pictures, strict=True)]
    ranked = sorted(gains, key=lambda gain: gain[0])
    worse = [gain for gain in ranked if gain[0] < 0]
    better = [gain for gain in reversed(ranked) if gain[0] > 0]
    half = max(count // 2, count - len(better))
    chosen = worse[:half]
    chosen += better[: count - len(chosen)]
    chosen.sort(key=lambda gain: -abs(gain[0]))
    return Differing(first, second, [(one, other) for _, one, other in chosen])


def _extremes(standings: Standings, groups: Sequence[Group]) -> tuple[Group, Group]:
    def cider(group: Group) -> float:
        score = standings.scores[group.name].get("CIDEr")
        return score.mean if score else 0.0

    ranked = sorted(groups, key=lambda group: (group.parameters or 0, cider(group)))
    return ranked[0], ranked[-1]


def _cider(picture: PictureRecord) -> float:
    assert picture.scores is not None
    return picture.scores.cider
