"""Learning curves of all models over pairs and time, and scores against what they cost."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efficap.evaluation.compare.groups import Group
from efficap.evaluation.compare.runs import Run
from efficap.evaluation.compare.standings import Standings
from efficap.evaluation.curves import logged_values, read_metrics, tidy
from efficap.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4878a8", "#d9742b", "#3a8f5c", "#8a5aa8", "#c44e52", "#8c613c", "#d586b8", "#797979", "#b0a030")
LINES = ("-", "--", ":", "-.")  # for models beyond the colours
MARKERS = "osD^vP*X"
MINUTES = "training time, minutes"
LEGEND_LINE = 0.22  # inches

Floats = NDArray[np.float64]
# What a model costs: the axis' label, the figure of a run, whether the axis is logarithmic.
COSTS: tuple[tuple[str, Callable[[Run], float | None], bool], ...] = (
    ("parameters", lambda run: run.metrics.get("parameters"), True),
    ("image-caption pairs trained on", lambda run: run.metrics.get("pairs"), False),
    (MINUTES, lambda run: _minutes(run), False),
)


def plot_learning(groups: Sequence[Group], png: Path) -> bool:
    """Draw val/CIDEr and val/loss of each run over pairs seen and over the time of training without validations.

    Runs of a model share its colour. A run without metrics.csv, or that never validated, is left out.

    Returns:
        Whether there was anything to draw.

    Raises:
        InputError: a metrics.csv is damaged.
    """
    curves = [
        (number, group, read_metrics(run.path / "metrics.csv"), run)
        for number, group in enumerate(groups)
        for run in group.runs
        if (run.path / "metrics.csv").is_file() and run.metrics.get("steps")
    ]
    names = [n for n in ("val/CIDEr", "val/loss") if any(len(logged_values(t, n)) for _, _, t, _ in curves)]
    if not names:
        return False
    figure, axes = _figure(len(names), 2)
    labelled: set[int] = set()
    for number, group, table, run in curves:
        for row, name in enumerate(names):
            values = logged_values(table, name)
            scale = 100 if name == "val/CIDEr" else 1
            for panel, spent in zip(
                axes[row], spent_at(table, run, values.index.to_numpy(dtype=float)), strict=True
            ):
                label = None if number in labelled else group.name
                labelled.add(number)
                panel.plot(
                    spent, scale * values.to_numpy(), label=label, **_style(number), marker="o", markersize=3
                )
    for row, name in enumerate(names):
        axes[row][0].set_ylabel("validation CIDEr × 100" if name == "val/CIDEr" else "validation loss")  # noqa: RUF001
        _axis(axes[row][0], "image-caption pairs seen")
        _axis(axes[row][1], MINUTES)
    _finish(figure, axes, png)
    return True


def spent_at(table: pd.DataFrame, run: Run, steps: Floats) -> tuple[Floats, Floats]:
    """Pairs seen and minutes trained at `steps`, between what was logged on a straight line."""
    rate = logged_values(table, "train/pairs_per_second")  # mean since the start, so that time = pairs / rate
    rate = rate[
        rate.index < run.metrics["steps"]
    ]  # a run that was killed has logged more than it has summed up
    pairs = logged_values(table, "train/pairs").reindex(rate.index)
    last_step, last_pairs = run.metrics["steps"], run.metrics.get("pairs", 0)
    each = last_pairs / last_step
    seen = pairs.fillna(rate.index.to_series() * each).to_numpy(dtype=float)  # older runs did not log pairs
    at = np.array([0.0, *rate.index, last_step])
    minutes = np.array([0.0, *(seen / rate.to_numpy() / 60), _minutes(run) or 0.0])
    return np.interp(steps, at, np.array([0.0, *seen, last_pairs])), np.interp(steps, at, minutes)


def plot_costs(groups: Sequence[Group], standings: Sequence[Standings], png: Path) -> bool:
    """Draw CIDEr of each split against parameters, pairs and time: a point a model, bars of ± sd over its seeds.

    A model has its colour of `plot_learning`, by its place in `groups`.

    Returns:
        Whether there was anything to draw.
    """
    shown = [split for split in standings if any("CIDEr" in scores for scores in split.scores.values())]
    if not shown:
        return False
    numbers = {group.name: number for number, group in enumerate(groups)}
    figure, axes = _figure(len(shown), len(COSTS))
    for panels, split in zip(axes, shown, strict=True):
        for panel, (label, cost, logarithmic) in zip(panels, COSTS, strict=True):
            for group in split.groups:
                _point(panel, group, split, cost, numbers[group.name])
            panel.margins(0.1)
            _axis(panel, label, logarithmic=logarithmic)
        panels[0].set_ylabel(f"{split.split}: CIDEr × 100")  # noqa: RUF001
    _finish(figure, axes, png)
    return True


def _point(
    panel: Axes, group: Group, split: Standings, cost: Callable[[Run], float | None], number: int
) -> None:
    costs = [value for run in group.evaluated(split.split) if (value := cost(run))]
    score = split.scores[group.name].get("CIDEr")
    if not costs or score is None:
        return
    panel.errorbar(
        [statistics.fmean(costs)],
        [100 * score.mean],
        None if score.sd is None else [100 * score.sd],
        label=group.name,
        linestyle="none",
        capsize=3,
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number // len(COLOURS) % len(MARKERS)],
    )


def _minutes(run: Run) -> float | None:
    seconds = run.metrics.get("training_seconds")
    if seconds is None and run.metrics.get("pairs_per_second"):  # of runs that did not keep it
        seconds = run.metrics["pairs"] / run.metrics["pairs_per_second"]
    return None if seconds is None else seconds / 60


def _style(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number // len(COLOURS) % len(LINES)],
    }


def _axis(panel: Axes, label: str, *, logarithmic: bool = False) -> None:
    """The axis of a cost, from 0 unless logarithmic; large numbers as 200 k and 1.5 M."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    panel.set_xlabel(label)
    if logarithmic:
        panel.set_xscale("log")
        wide = panel.dataLim.x1 > 50 * panel.dataLim.x0
        panel.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.set_xlim(0, 1.08 * max(panel.dataLim.x1, 1e-9))
    if label != MINUTES:
        panel.xaxis.set_major_formatter(EngFormatter())


def _figure(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # All figures are about as wide, so that the page shows their words in one size.
    width = max(9.6, 3.4 * columns)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)  # inches
    figure = Figure(figsize=(width, 3.2 * rows), dpi=150, layout=layout)
    return figure, [list(row) for row in figure.subplots(rows, columns, squeeze=False)]


def _finish(figure: Figure, axes: list[list[Axes]], png: Path) -> None:
    for panel in itertools.chain.from_iterable(axes):
        tidy(panel)
    handles: dict[str, Any] = {}
    for panel in itertools.chain.from_iterable(axes):
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = 1 if max(map(len, handles), default=0) > 60 else 2
    names = [name.replace("$", r"\$") for name in handles]  # matplotlib would set them as mathematics
    figure.set_figheight(figure.get_figheight() + LEGEND_LINE * math.ceil(len(names) / columns))
    if handles:
        figure.legend(list(handles.values()), names, loc="outside lower center", frameon=False, ncols=columns)
    with replacing(png) as file:
        figure.savefig(file, format="png")
