"""The tables of a comparison: for the screen, for a paper (Markdown) and for the page, from the same cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from efficap.evaluation.compare.groups import Group
from efficap.evaluation.compare.runs import METRICS
from efficap.evaluation.compare.standings import RESAMPLED, Difference, Score, Standings

if TYPE_CHECKING:
    import rich.table

NOTHING = "–"  # noqa: RUF001


class Cells(NamedTuple):
    """A table of text; `best` holds (row, column) of what is to stand out."""

    title: str
    header: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    left: int  # columns of words, which come first


def scores_cells(standings: Standings) -> Cells:
    """A row for each model: what it is, what it cost, its scores."""
    header = ["model", "data", "seeds", "parameters", "pairs/s", *METRICS]
    rows = []
    for group in standings.groups:
        scores = standings.scores[group.name]
        rows.append(
            [
                group.model,
                group.data,
                f"{len({run.seed for run in group.evaluated(standings.split)})}",
                parameters(group),
                _rate(group),
                *(_score(scores.get(metric)) for metric in METRICS),
            ]
        )
    best = set()
    for column, metric in enumerate(METRICS, start=header.index(METRICS[0])):
        means = [standings.scores[group.name].get(metric) for group in standings.groups]
        known = [score.mean for score in means if score]
        if len(known) > 1:
            best |= {(row, column) for row, score in enumerate(means) if score and score.mean == max(known)}
    return Cells(f"{standings.split}: {standings.pictures:,} pictures", header, rows, best, left=2)


def pairs_cells(standings: Standings) -> Cells:
    """A row for each two models: the second's scores less the first's, and p-values."""
    header = ["first", "second"]
    for metric in RESAMPLED:
        header += [f"Δ {metric}", "p"]
    rows = [
        [pair.first.name, pair.second.name]
        + [cell for metric in RESAMPLED for cell in _difference(pair.differences[metric])]
        for pair in standings.pairs
    ]
    return Cells(f"{standings.split}: differences, second - first", header, rows, set(), left=2)


def parameters(group: Group) -> str:
    """Their number as a table of sizes gives it, such as ``188 M``."""
    count = group.parameters
    if count is None:
        return NOTHING
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)


def _rate(group: Group) -> str:
    rates = [run.metrics["pairs_per_second"] for run in group.runs if run.metrics.get("pairs_per_second")]
    return f"{sum(rates) / len(rates):,.0f}" if rates else NOTHING


def _score(score: Score | None) -> str:
    if score is None:
        return NOTHING
    text = f"{100 * score.mean:.1f}"
    if score.sd is not None:
        text += f" ± {100 * score.sd:.1f}"
    return text + (f" {_bounds(score.bounds)}" if score.bounds else "")


def _difference(difference: Difference) -> tuple[str, str]:
    p = f"{difference.p:.3f}" if difference.p >= 0.001 else f"{difference.p:.1g}"
    return f"{100 * difference.mean:+.1f} {_bounds(difference.bounds)}", p


def _bounds(bounds: tuple[float, float]) -> str:
    return f"[{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def explanation(standings: Sequence[Standings], resamples: int) -> list[str]:
    """What the numbers are, in sentences."""
    lines = ["Scores are times 100, as papers print them; ± is the standard deviation over seeds."]
    if any(
        split.pairs or any(s.bounds for m in split.scores.values() for s in m.values()) for split in standings
    ):
        lines.append(
            f"In brackets: 95 % intervals of {resamples:,} resamples of the pictures, the same ones for all models; "
            "p: two-sided, paired bootstrap (Koehn 2004), not corrected for the number of pairs, and "
            f"at least {2 / (resamples + 1):.1g} with so many resamples. Within a resample, a "
            "model's score is the mean of its seeds' scores: seeds are not resampled."
        )
    return lines


def markdown(cells: Cells) -> str:
    """As a table of Markdown under a heading."""
    lines = [f"## {escaped(cells.title)}", "", _line(cells.header)]
    lines.append("|" + "---|" * cells.left + "---:|" * (len(cells.header) - cells.left))
    for number, row in enumerate(cells.rows):
        texts = map(escaped, row)
        lines.append(_line([f"**{t}**" if (number, c) in cells.best else t for c, t in enumerate(texts)]))
    return "\n".join(lines) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def escaped(text: str) -> str:
    """As Markdown shows it as it is, in one line."""
    return " ".join(re.sub(r"([\\|*_`<\[])", r"\\\1", text).split())


def screen_table(cells: Cells) -> rich.table.Table:
    """As a table of rich's."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(cells.title))
    for number, name in enumerate(cells.header):
        table.add_column(name, justify="left" if number < cells.left else "right", overflow="fold")
    for number, row in enumerate(cells.rows):
        table.add_row(
            *(
                Text(text.replace(" [", "\n["), style="bold" if (number, column) in cells.best else "")
                for column, text in enumerate(row)
            )
        )
    return table
