"""What eval.py calls: one run, an ensemble of several, or several in turn with a table at the end."""

from __future__ import annotations

import sys
import traceback
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from efficap.commands.evaluate import evaluate
from efficap.commands.kinds import check_form
from efficap.commands.schema import EVAL
from efficap.errors import InputError
from efficap.launch import launch
from efficap.ranks import leave


def evaluate_runs(cfg: dict[str, Any]) -> list[dict[str, Any]]:
    """Evaluate as the plain values of conf/eval.yaml say; returns the scores of each evaluation.

    Of several runs one that fails leaves the others alone: it is named at once and at the end.

    Raises:
        InputError: one of several runs failed; no runs; or as `evaluate`.
    """
    check_form(cfg, EVAL)
    if cfg["ensemble"] or not isinstance(cfg["run"], list):
        scores = evaluate(cfg)
        leave()
        return [scores]
    if launch().world > 1:
        raise InputError(f"run={cfg['run']}: several processes evaluate one run; start them for each")
    if not cfg["run"]:
        raise InputError("run=[] names no run; give some, as run=[outputs/a,outputs/b]")
    results: dict[str, dict[str, Any] | str] = {}
    for number, run in enumerate(map(str, dict.fromkeys(cfg["run"])), start=1):
        print(f"{run} ({number} of {len(cfg['run'])})", file=sys.stderr)
        try:
            results[run] = evaluate({**cfg, "run": run})
        except InputError as error:
            results[run] = str(error)
        except Exception as error:  # a night's evaluations are not to end with the first
            traceback.print_exc()
            results[run] = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(reason := results[run], str):
            print(f"{run} failed: {reason}", file=sys.stderr)
    Console().print(_runs_table(results))
    failed = [run for run, result in results.items() if isinstance(result, str)]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(results)} runs failed: {', '.join(failed)}; the reasons stand above"
        )
    return [result for result in results.values() if not isinstance(result, str)]


def _runs_table(results: dict[str, dict[str, Any] | str]) -> Table:
    """A row for each run: its scores of the whole split, or that it failed."""
    scored = [result for result in results.values() if not isinstance(result, str)]
    names = dict.fromkeys(
        name
        for scores in scored
        for name, value in scores.items()
        if isinstance(value, float) and "/" not in name
    )
    table = Table()
    table.add_column("run", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for run, result in results.items():
        if isinstance(result, str):
            table.add_row(Text(run), *([Text("failed", style="bold red")] if names else []))
            continue
        values = [result.get(name) for name in names]
        table.add_row(Text(run), *(f"{value:.3f}" if isinstance(value, float) else "-" for value in values))
    return table
