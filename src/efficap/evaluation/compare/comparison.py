"""The command's work: read the runs, compare them, write the folder and say what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, track

from efficap.errors import InputError
from efficap.evaluation.compare.differing import Differing, differing_pictures
from efficap.evaluation.compare.groups import Group, group_runs
from efficap.evaluation.compare.page import write_page
from efficap.evaluation.compare.plots import plot_costs, plot_learning
from efficap.evaluation.compare.runs import Run, check_same_pictures, find_runs, read_run
from efficap.evaluation.compare.standings import Standings, stand
from efficap.evaluation.compare.table import (
    Cells,
    escaped,
    explanation,
    markdown,
    pairs_cells,
    scores_cells,
    screen_table,
)
from efficap.files import replacing

TITLE = "Comparison of runs"
PAGE = "index.html"
LEARNING, COSTS = "learning.png", "cost.png"
WIDTH = 120  # columns of what is printed into a file or a pipe, at least
HEADINGS = {LEARNING: "Learning curves", COSTS: "Scores and what they cost"}


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        groups: all models, by parameters.
        unscored: runs without scores.
        standings: of each split, the test split first.
        resamples: of the bootstrap.
    """

    groups: list[Group]
    unscored: list[Run]
    standings: list[Standings]
    resamples: int

    def tables(self) -> list[Cells]:
        """The scores of each split, then the differences of each."""
        scores = [scores_cells(split) for split in self.standings]
        return scores + [pairs_cells(split) for split in self.standings if split.pairs]

    def remarks(self) -> list[str]:
        """Sentences that belong to the tables."""
        notes = dict.fromkeys(note for split in self.standings for note in split.notes)
        left_out = [f"{run.path} has no scores: python eval.py run={run.path}" for run in self.unscored]
        return [*explanation(self.standings, self.resamples), *notes, *left_out]


def compare_runs(
    folders: Sequence[Path], *, resamples: int, seed: int, between: Sequence[str] | None = None
) -> Comparison:
    """Read all runs in or below `folders` and compare them.

    Args:
        folders: run directories, or folders with some below.
        resamples: of the bootstrap.
        seed: of its drawing.
        between: names of two models that must be there.

    Raises:
        InputError: no runs, none with scores, damaged files, runs evaluated on different pictures, or a model of
            `between` that is not there.
    """
    if resamples < 100:
        raise InputError(f"--resamples {resamples} must be at least 100; 10000 tells p-values down to 0.0002")
    if seed < 0:
        raise InputError(f"--seed {seed} must be at least 0")
    console = Console(stderr=True)
    silent = not console.is_terminal  # else rich writes an empty line
    paths = find_runs(folders)
    runs = [
        read_run(path)
        for path in track(paths, "Reading runs", console=console, transient=True, disable=silent)
    ]
    scored = [run for run in runs if run.evaluations]
    if not scored:
        raise InputError(
            f"none of the runs found, {len(runs)}, has scores; python eval.py run={runs[0].path} computes them"
        )
    splits = sorted({split for run in scored for split in run.evaluations}, key=lambda s: (s != "test", s))
    for split in splits:
        check_same_pictures(scored, split)
    groups = sorted(group_runs(runs), key=lambda group: (group.parameters or 0, group.name))
    for name in between or ():
        if name not in {group.name for group in groups}:
            known = ", ".join(repr(group.name) for group in groups)
            raise InputError(f"--between: {name!r} is no model here; there are {known}")
    with Progress(console=console, transient=True, disable=silent) as progress:
        task = progress.add_task("Resampling pictures", total=resamples * len(splits))
        standings = [
            stand(
                groups,
                split,
                resamples=resamples,
                seed=seed,
                advance=lambda done: progress.advance(task, done),
            )
            for split in splits
        ]
    return Comparison(groups, [run for run in runs if not run.evaluations], standings, resamples)


def write_comparison(
    comparison: Comparison, out: Path, *, between: Sequence[str] | None, pictures: int
) -> None:
    """Write comparison.md, learning.png, cost.png and index.html into `out`.

    Args:
        comparison: what was found.
        out: the folder, made where it is not there.
        between: names of the two models whose captions are shown; None chooses.
        pictures: shown of each split.

    Raises:
        InputError: a metrics.csv is damaged.
    """
    differing: list[tuple[str, Differing]] = []
    for split in comparison.standings:
        gallery = differing_pictures(split, between, pictures)
        if gallery and gallery.pictures:
            differing.append((split.split, gallery))
    plots = []
    for name, drawn in (
        (LEARNING, plot_learning(comparison.groups, out / LEARNING)),
        (COSTS, plot_costs(comparison.groups, comparison.standings, out / COSTS)),
    ):
        if drawn:
            plots.append((HEADINGS[name], out / name))
        else:
            (out / name).unlink(missing_ok=True)  # of an earlier comparison
    tables = comparison.tables()
    with replacing(out / "comparison.md") as file:
        parts = [f"# {TITLE}\n", *map(markdown, tables)]
        parts.append("".join(f"- {escaped(remark)}\n" for remark in comparison.remarks()))
        parts += [f"![{heading}]({png.name})\n" for heading, png in plots]
        file.write("\n".join(parts).encode("utf-8", "replace"))
    write_page(
        out / PAGE,
        title=TITLE,
        tables=tables,
        remarks=comparison.remarks(),
        plots=plots,
        differing=differing,
    )


def print_comparison(comparison: Comparison, out: Path) -> None:
    """The tables of scores, what must be known of them, and where the rest lies."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for split in comparison.standings:
        console.print(screen_table(scores_cells(split)))
    for remark in comparison.remarks():
        console.print(remark, soft_wrap=True, highlight=False, markup=False)
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    console.print(
        f"tables, plots and pictures: {shown / PAGE}", soft_wrap=True, highlight=False, markup=False
    )
