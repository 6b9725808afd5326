"""A diagnosis for the screen and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from efficap.data.doctor.diagnosis import Diagnosis
from efficap.data.doctor.files import write_text
from efficap.data.doctor.findings import Finding

NAMED = 10  # places of each kind on the screen and on the page
PARTS = 8  # splits or shards with a row of their own


def write_json(file: Path, diagnosis: Diagnosis) -> None:
    """Write all of a diagnosis; of each finding it holds up to `findings.LISTED` places.

    Raises:
        InputError: it cannot be written.
    """
    write_text(file, json.dumps(asdict(diagnosis), indent=1) + "\n", "name another folder with --out DIR")


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print counts, findings with the first ten places of each, and notes."""
    console.print(_counts(diagnosis))
    for line in summary(diagnosis):
        console.print(Text(line), soft_wrap=True)
    console.print()
    for finding in diagnosis.findings:
        _print_finding(finding, console)
    if not diagnosis.findings:
        console.print(Text("Nothing is wrong.", style="green"))
    for note in diagnosis.notes:
        console.print(Text(note, style="dim"), soft_wrap=True)


def summary(diagnosis: Diagnosis) -> Iterator[str]:
    """Sizes, lengths and the yield of a download, a line each."""
    for entry in diagnosis.histograms:
        yield f"{entry.title}: {entry.least:,.5g} to {entry.most:,.5g}, median {entry.median:,.5g}"
    per_picture = diagnosis.captions_per_picture
    if per_picture:
        numbers = [f"{count:,} pictures have {number}" for number, count in list(per_picture.items())[:PARTS]]
        yield f"captions of a picture: {', '.join(numbers)}{', …' if len(per_picture) > PARTS else ''}"
    if (downloads := diagnosis.downloads) is not None:
        urls, successes = int(str(downloads["urls"])), int(str(downloads["successes"]))
        yield (
            f"download: {successes:,} of {urls:,} addresses gave a picture ({successes / max(1, urls):.1%}), "
            f"{int(str(downloads['found'])):,} are in the shards"
        )


def _counts(diagnosis: Diagnosis) -> Table:
    table = Table(title=Text(diagnosis.source), title_justify="left")
    table.add_column({"table": "split", "shards": "shard"}[diagnosis.kind])
    for column in ("pictures", "captions", "unusable"):
        table.add_column(column, justify="right")
    parts = diagnosis.parts
    shown = parts if len(parts) <= PARTS else []  # of many shards, the sum alone
    for part in shown:
        table.add_row(Text(part.name), f"{part.pictures:,}", f"{part.captions:,}", f"{part.bad:,}")
    if len(parts) != 1:
        table.add_section()
        what = f"{len(parts):,} {'splits' if diagnosis.kind == 'table' else 'shards'}"
        table.add_row(what, f"{diagnosis.pictures:,}", f"{diagnosis.captions:,}", f"{diagnosis.bad:,}")
    return table


def _print_finding(finding: Finding, console: Console) -> None:
    console.print(
        Text.assemble((f"{finding.title}: ", "bold"), (f"{finding.count:,}", "bold red")), soft_wrap=True
    )
    for name in finding.names[:NAMED]:
        console.print(Padding(Text(name, no_wrap=True, overflow="ellipsis"), (0, 0, 0, 4)))
    if len(finding.names) > NAMED:
        console.print(Text("    … more in report.json", style="dim"))
    if finding.advice:
        console.print(Padding(Text(finding.advice, style="dim"), (0, 0, 0, 2)))
