"""``make soak``: faults thrown at trainings for up to twenty minutes, and a table of what came of them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from soak.faults import ENDING, PASSING, TRUNCATED
from soak.soak import Outcome, Soak


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make soak ARGS='…'",
        description="Throw faults at trainings; they must end with the weights of trainings that none hit.",
    )
    parser.add_argument("--faults", type=int, default=50, help="to be survived")
    parser.add_argument(
        "--seed", type=int, default=None, help="of their kinds and times; otherwise by the clock"
    )
    parser.add_argument("--epochs", type=int, default=60, help="of each training, of 12 steps each")
    parser.add_argument("--minutes", type=float, default=20, help="after which no further training is begun")
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    console = Console(stderr=True)
    console.print(f"seed {seed}")
    bar = Progress(
        "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with tempfile.TemporaryDirectory(prefix="efficap-soak-") as folder, bar:
        tempfile.tempdir = folder  # of what its processes say
        task = bar.add_task("faults survived", total=options.faults)
        outcome = Soak(
            Path(folder),
            faults=options.faults,
            seed=seed,
            epochs=options.epochs,
            minutes=options.minutes,
            on_fault=lambda kind: bar.update(task, advance=1, description=f"{kind} survived"),
        ).run()
    report(outcome, options.faults)
    return int(bool(outcome.problems) or outcome.survived.total() < options.faults)


def report(outcome: Outcome, wanted: int) -> None:
    for problem in outcome.problems:
        print(problem)
    print(f"{'fault':24}{'thrown':>8}{'survived':>10}")
    for kind in (*ENDING, *PASSING, TRUNCATED):
        print(f"{kind:24}{outcome.thrown[kind]:8}{outcome.survived[kind]:10}")
    print(f"{'all':24}{outcome.thrown.total():8}{outcome.survived.total():10}, of {wanted} wanted")
    print(f"{outcome.trainings} trainings in {outcome.processes} processes, {outcome.seconds / 60:.1f} min")
    equal = not outcome.problems
    print("weights, optimiser and log are those of undisturbed trainings" if equal else "NOT AS UNDISTURBED")
    found = {"seed": outcome.seed, "survived": dict(outcome.survived), "equal": equal}
    print(json.dumps({**found, "trainings": outcome.trainings, "seconds": round(outcome.seconds)}))


if __name__ == "__main__":
    sys.exit(main())
