"""How the models stand on a split: scores over seeds, their intervals, and the difference of each two."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from efficap.evaluation.bootstrap import interval, p_value, resample
from efficap.evaluation.compare.groups import Group
from efficap.evaluation.compare.runs import METRICS, Run
from efficap.evaluation.sums import Floats

RESAMPLED = ("CIDEr", "BLEU-4")


@dataclass(frozen=True)
class Score:
    """A metric of a model on pycocoevalcap's scale.

    Attributes:
        mean: over seeds.
        sd: standard deviation over seeds (of a sample, n - 1); None of a single one.
        bounds: 95 % interval over resamples of the pictures; None where there is none.
    """

    mean: float
    sd: float | None = None
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    """Of a metric between two models, the second's less the first's: 95 % interval and two-sided p-value."""

    mean: float
    bounds: tuple[float, float]
    p: float


@dataclass(frozen=True)
class Pair:
    first: Group
    second: Group
    differences: dict[str, Difference]  # by metric, of `RESAMPLED`


@dataclass
class Standings:
    """The models on a split.

    Attributes:
        split: its name.
        pictures: in it.
        scores: of each model by name, metric -> score; a metric that failed or was not asked for is left out.
        groups: the models evaluated on it, in the order of the tables.
        pairs: each two of those that could be resampled.
        notes: what a reader must know, such as runs that were decoded differently.
    """

    split: str
    pictures: int
    groups: list[Group]
    scores: dict[str, dict[str, Score]]
    pairs: list[Pair] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def stand(
    groups: Sequence[Group], split: str, *, resamples: int, seed: int, advance: Callable[[int], object]
) -> Standings:
    """Scores and differences of the models evaluated on `split`; `check_same_pictures` must have passed.

    With several seeds a model's score in a resample is the mean of its runs' scores on the same pictures, so that
    intervals and p-values tell what another draw of pictures might change for these very runs. What another seed might
    change is told by the standard deviation alone.
    """
    present = [group for group in groups if group.evaluated(split)]
    ids = present[0].evaluated(split)[0].evaluations[split].image_ids
    scores = {group.name: _over_seeds(group.evaluated(split), split) for group in present}
    standings = Standings(split, len(ids), present, scores, notes=_notes(present, split))
    ready = [g for g in present if all(run.evaluations[split].resampled for run in g.evaluated(split))]
    if ready:
        resampled = _resampled(ready, split, resamples=resamples, seed=seed, advance=advance)
        _add_intervals(standings, ready, resampled)
    return standings


def _over_seeds(runs: Sequence[Run], split: str) -> dict[str, Score]:
    scores = {}
    for metric in METRICS:
        found = [run.evaluations[split].scores.get(metric) for run in runs]
        values = [value for value in found if isinstance(value, float)]
        if len(values) == len(runs):  # else a mean would be of other seeds than its neighbours'
            sd = statistics.stdev(values) if len(values) > 1 else None
            scores[metric] = Score(statistics.fmean(values), sd)
    return scores


def _resampled(
    groups: Sequence[Group], split: str, *, resamples: int, seed: int, advance: Callable[[int], object]
) -> dict[str, tuple[dict[str, Floats], dict[str, float]]]:
    """Of each model and metric the scores (R,) in all resamples, and the score of the split as it is."""
    runs = [run for group in groups for run in group.evaluated(split)]
    parts = [
        [picture.scores for picture in run.evaluations[split].pictures if picture.scores is not None]
        for run in runs
    ]
    drawn = resample(parts, resamples=resamples, seed=seed, advance=advance)
    of_groups = {}
    start = 0
    for group in groups:
        own = slice(start, start := start + len(group.evaluated(split)))
        of_groups[group.name] = (
            {"CIDEr": drawn.cider[:, own].mean(axis=1), "BLEU-4": drawn.bleu4[:, own].mean(axis=1)},
            {"CIDEr": float(drawn.cider_of_all[own].mean()), "BLEU-4": float(drawn.bleu4_of_all[own].mean())},
        )
    return of_groups


def _add_intervals(
    standings: Standings,
    groups: Sequence[Group],
    resampled: dict[str, tuple[dict[str, Floats], dict[str, float]]],
) -> None:
    for group in groups:
        scores, (drawn, _) = standings.scores[group.name], resampled[group.name]
        for metric in RESAMPLED:
            if metric in scores:
                scores[metric] = Score(scores[metric].mean, scores[metric].sd, interval(drawn[metric]))
    for first, second in itertools.combinations(groups, 2):
        (one, one_of_all), (other, other_of_all) = resampled[first.name], resampled[second.name]
        differences = {
            metric: Difference(
                other_of_all[metric] - one_of_all[metric],
                interval(other[metric] - one[metric]),
                p_value(other[metric] - one[metric]),
            )
            for metric in RESAMPLED
        }
        standings.pairs.append(Pair(first, second, differences))


def _notes(groups: Sequence[Group], split: str) -> list[str]:
    notes = []
    found: dict[str, list[str]] = {}
    for group in groups:
        for run in group.evaluated(split):
            scores = run.evaluations[split].scores
            failed = [
                name.removesuffix("_error") for name in scores if name.endswith("_error") and "/" not in name
            ]
            notes += [f"{group.name}: {metric} failed in {run.path} on {split}" for metric in failed]
            if run.metrics.get("finished") is False:
                notes.append(f"{group.name}: {run.path} has not come to its end")
            how = f"{scores.get('decoding')}, {scores.get('precision')}"
            found.setdefault(how, []).append(group.name)
        for seed, count in Counter(run.seed for run in group.evaluated(split)).items():
            if count > 1:
                notes.append(
                    f"{group.name}: {count} runs of seed {seed}; its mean and ± are not over seeds alone"
                )
        missing = len(group.runs) - len(group.evaluated(split))
        if missing:
            notes.append(f"{group.name}: {missing} of {len(group.runs)} runs were not evaluated on {split}")
        without = [run for run in group.evaluated(split) if not run.evaluations[split].resampled]
        if without:
            notes.append(
                f"{group.name}: no interval, for {without[0].path} has no scores of each picture on {split}; "
                "run eval.py again"
            )
    if len(found) > 1:
        ways = "; ".join(f"{', '.join(dict.fromkeys(names))}: {how}" for how, names in found.items())
        notes.append(f"captions were not written in the same way: {ways}")
    return notes
