"""``python -m efficap.training.watch RUN``: a training as it goes on, in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from efficap.errors import InputError
from efficap.evaluation.curves import SMOOTHED_SHARE, logged_values, read_metrics
from efficap.evaluation.pictures import PictureRecord, read_pictures
from efficap.files import path_argument
from efficap.training.progress import SAMPLES_FILE, at_work, is_finished
from efficap.training.terminal_plot import Curve, plot
from efficap.yaml_files import read_yaml

TRAINING, FINISHED, STOPPED = "training", "finished", "stopped"
_JOINED = "\u00a0"  # a space at which no line ends
_STYLES = {TRAINING: "bold green", FINISHED: "bold blue", STOPPED: "bold red"}


@dataclass(frozen=True, slots=True)
class Watched:
    """What a run directory tells at one moment.

    Attributes:
        name: the run's.
        path: its directory.
        state: ``training``, ``finished`` or ``stopped``.
        log: of metrics.csv; empty before the first step.
        samples: the captions of the last validation.
    """

    name: str
    path: Path
    state: str
    log: pd.DataFrame
    samples: list[PictureRecord]

    def curve(self, name: str) -> pd.Series[float]:
        return logged_values(self.log, name)

    def last(self, name: str) -> float | None:
        values = self.curve(name)
        return float(values.iloc[-1]) if len(values) else None

    @property
    def seconds(self) -> float | None:
        """Of training so far, validations left out."""
        pairs, rate = self.last("train/pairs"), self.last("train/pairs_per_second")
        return pairs / rate if pairs is not None and rate else None

    @property
    def seconds_left(self) -> float | None:
        """At the rate so far, validations left out; in a training of stages, of the one that it is in."""
        progress = self.curve("train/progress")
        seconds = self.curve("train/pairs") / self.curve("train/pairs_per_second")
        share, since, begun = self.last("train/progress"), self.seconds, 0.0
        if share is None or since is None:
            return None
        falls = progress.index[progress.diff() < 0]  # a stage began, or the training was prolonged
        if len(falls):
            begun, since = float(progress[falls[-1]]), since - float(seconds[falls[-1]])
        return since * (1 - share) / (share - begun) if share > begun else None


def read_run(path: Path, before: Watched | None = None) -> Watched:
    """Read a run directory that a training may be writing.

    Args:
        before: what it told last, for a file that is half written now.

    Raises:
        InputError: it is no run directory.
    """
    config = _config(path)
    state = TRAINING if at_work(path) else FINISHED if is_finished(path) else STOPPED
    try:
        log = read_metrics(path / "metrics.csv")
    except InputError:  # not there yet, or between two lines
        log = before.log if before else pd.DataFrame({"step": []})
    try:
        samples = read_pictures(path / SAMPLES_FILE)
    except InputError:
        samples = before.samples if before else []
    return Watched(str(config["name"]), path, state, log, samples)


def _config(path: Path) -> dict[str, Any]:
    config = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else None
    if not isinstance(config, dict) or "name" not in config:
        raise InputError(
            f"{path} holds no config.yaml of a run; give a run directory, such as outputs/latest"
        )
    return config


def screen(run: Watched, width: int, samples: int) -> RenderableType:
    """Everything on one screen: how far the run is, its curves, and captions of the last validation."""
    half = max(30, width // 2)
    inside = half - 4
    last_step = float(run.log["step"].max()) if len(run.log) else 0.0
    loss = run.curve("train/loss")
    smooth = loss.ewm(span=max(1.0, SMOOTHED_SHARE * len(loss))).mean()
    losses = [Curve(smooth, "blue"), Curve(run.curve("val/loss"), "yellow")]
    scores = [Curve(run.curve("val/CIDEr"), "green")]
    panels = [
        Panel(plot(curves, inside, 10, last_step=last_step), title=title, title_align="left", width=half)
        for title, curves in (
            ("loss: [blue]training[/], [yellow]validation[/]", losses),
            ("[green]val/CIDEr[/]", scores),
        )
    ]
    share = 1.0 if run.state == FINISHED else run.last("train/progress") or 0.0
    bar = Table.grid()  # by itself a bar ends no line where there are no colours
    bar.add_row(ProgressBar(total=1.0, completed=share, width=width))
    return Group(_head(run), bar, _figures(run), Columns(panels, padding=0), *_samples(run.samples[:samples]))


def _head(run: Watched) -> Text:
    note = {
        TRAINING: "" if len(run.log) else "; no step is logged yet",
        FINISHED: "",
        STOPPED: "; no process trains it any more",
    }[run.state]
    if run.state == STOPPED and (run.path / "checkpoints").is_dir():
        note += f"; python train.py resume={run.path} goes on"
    return Text.assemble((run.name, "bold"), "  ", (run.state, _STYLES[run.state]), note)


def _figures(run: Watched) -> Text:
    """The newest value of each."""
    seconds, left = run.seconds, run.seconds_left if run.state == TRAINING else None
    figures = {
        "step": f"{int(run.log['step'].max()) + 1:,}" if len(run.log) else None,
        "epoch": _number(run.last("epoch"), ".0f"),
        "pairs": _number(run.last("train/pairs"), ",.0f"),
        "pairs/s": _number(run.last("train/pairs_per_second"), ",.0f"),
        "trained for": duration(seconds) if seconds is not None else None,
        "left": f"about {duration(left)}" if left is not None else None,
        "val/CIDEr": _number(run.last("val/CIDEr"), ".3f"),
        "val/BLEU-4": _number(run.last("val/BLEU-4"), ".3f"),
    }
    text = Text()
    for name, value in figures.items():
        if value is not None:
            text.append(f"{name} {value}".replace(" ", _JOINED) + "  ")
    text.highlight_words([name.replace(" ", _JOINED) for name in figures], "dim")
    return text


def _samples(records: list[PictureRecord]) -> list[RenderableType]:
    lines = []
    for record in records:
        reference = record.references[0] if record.references else ""
        parts = (f"{record.image_id}  ", "dim"), record.caption, (f"  {reference}", "dim")
        lines.append(Text.assemble(*parts, no_wrap=True, overflow="ellipsis"))
    return [Text(""), *lines] if lines else []


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def duration(seconds: float) -> str:
    """As ``3 h 05 min``, ``12 min`` or ``40 s``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def watch(path: Path, console: Console, *, every: float, samples: int) -> Watched:
    """Show a run until it is finished or its process is gone; returns what it told last."""
    run = read_run(path)
    with Live(screen(run, console.width, samples), console=console, auto_refresh=False) as live:
        while run.state == TRAINING:
            time.sleep(every)
            run = read_run(path, run)
            live.update(screen(run, console.width, samples), refresh=True)
    return run


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m efficap.training.watch",
        description="Show a training as it goes on: losses, scores, captions of the last validation, speed, time left.",
        epilog="Ends by itself when the run is finished, with status 0, or when its process is gone, with status 1.",
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_argument, help="a run directory, such as outputs/latest"
    )
    parser.add_argument("--once", action="store_true", help="print one screen and end, with status 0")
    parser.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between looks (default: 2)"
    )
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="captions shown (default: 6)")
    options = parser.parse_args(arguments)
    console = Console()
    path = options.run.resolve()  # outputs/latest may move on to another run
    try:
        if not options.every > 0:
            raise InputError(f"--every {options.every:g} must be above 0 seconds")
        if options.once:
            console.print(screen(read_run(path), console.width, options.samples))
            return 0
        run = watch(path, console, every=options.every, samples=options.samples)
        return 0 if run.state == FINISHED else 1
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
