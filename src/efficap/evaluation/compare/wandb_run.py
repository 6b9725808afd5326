"""A comparison as a run of its own in Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from efficap.errors import InputError
from efficap.evaluation.compare.comparison import HEADINGS, PAGE, Comparison
from efficap.evaluation.compare.table import Cells


def log_comparison(comparison: Comparison, out: Path, project: str) -> str:
    """Log the tables, the plots and the page of a comparison that was written to `out`.

    Scores go to the run's summary as ``<split>/<metric>/<model>``, on pycocoevalcap's scale.

    Args:
        comparison: what was found.
        out: the comparison's folder; an offline run is kept in its folder ``wandb``.
        project: of W&B.

    Returns:
        Where the run is: its address, or the folder of an offline one and how to send it.

    Raises:
        InputError: W&B refuses.
    """
    import wandb

    try:
        return _log(comparison, out, project)
    except (wandb.Error, ValueError) as error:
        raise InputError(f"--wandb {project}: {error}; WANDB_MODE=offline needs no network") from error


def _log(comparison: Comparison, out: Path, project: str) -> str:
    import wandb

    runs = {group.name: [str(run.path) for run in group.runs] for group in comparison.groups}
    run = wandb.init(
        project=project,
        name="comparison",
        job_type="comparison",
        dir=out,
        mode=_mode(),
        config={"runs": runs, "resamples": comparison.resamples, "remarks": comparison.remarks()},
    )
    try:
        logged = {cells.title.partition(" pictures")[0]: _table(cells) for cells in comparison.tables()}
        logged |= {png.stem: wandb.Image(str(png)) for name in HEADINGS if (png := out / name).is_file()}
        run.log({**logged, "page": wandb.Html((out / PAGE).read_text(encoding="utf-8"), inject=False)})
        for split in comparison.standings:
            for name, scores in split.scores.items():
                run.summary.update({f"{split.split}/{metric}/{name}": s.mean for metric, s in scores.items()})
        folder = Path(run.dir).parent
        if run.disabled:
            return "nothing is logged, for WANDB_MODE=disabled"
        return f"{folder}; once you are logged in: wandb sync {folder}" if run.offline else str(run.url)
    finally:
        run.finish()


def _table(cells: Cells) -> Any:
    import wandb

    header: list[str | int] = list(cells.header)
    for number, name in enumerate(header):  # two columns of p-values need two names
        if name in header[:number]:
            header[number] = f"{name} {header[number - 1]}"
    return wandb.Table(columns=header, data=list(cells.rows))


def _mode() -> Any:
    """WANDB_MODE where it is set, online where a key is known, else offline."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode  # as it is now: W&B itself reads it once in a process
    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.Error:  # it cannot be reached
        return "offline"
