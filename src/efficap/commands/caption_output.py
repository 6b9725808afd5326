"""What captioning leaves and shows, of a folder and of shards: the record of what it was done with, rows, the bar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from efficap.commands.faults import check_writable
from efficap.commands.run_dir import RunDirectory
from efficap.decoding import deciding
from efficap.errors import InputError
from efficap.files import replacing
from efficap.training.writer import WrittenCaption

RECORD = "captioning.json"


def done_with(
    run: RunDirectory, settings: dict[str, Any], precision: torch.dtype, looking: dict[str, bool]
) -> dict[str, Any]:
    """What the results depend on besides the pictures; the batch changes none.

    Args:
        run: whose weights a training that goes on may replace.
        settings: of the decoding.
        precision: of the weights.
        looking: what is told of where the model looked.
    """
    return {
        "run": str(run.path),
        "weights": run.weights_digest(),
        "decoding": deciding(settings),
        "precision": str(precision).removeprefix("torch."),
        "attention": looking,
    }


def check_folder(folder: Path, record: dict[str, Any]) -> None:
    """Compare `record` with the one beside the results of a folder, if there is one.

    Raises:
        InputError: the folder holds results of another run, other weights, another decoding, precision or attention, or
            cannot be written.
    """
    check_writable(folder, "name another folder with out=DIR")
    file = folder / RECORD
    if not file.is_file():
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    same_weights = found.get("weights") == record["weights"]  # those of a run that may have been moved
    # Of earlier versions: all that there was, and of the weights nothing that was written down.
    found = {"precision": "float32", "attention": {}, "weights": record["weights"], **found}
    differs = [key for key in record if found.get(key) != record[key] and not (key == "run" and same_weights)]
    if differs:
        key, which = differs[0], "other" if differs[0] == "weights" else "another"
        raise InputError(
            f"{folder} holds captions of {which} {key}: {found.get(key)}, not {record[key]}; "
            "name another folder with out=DIR"
        )


def keep_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the record where there is none; the folder is made."""
    if not (folder / RECORD).is_file():
        with replacing(folder / RECORD) as file:
            file.write((json.dumps(record, indent=2) + "\n").encode())


def escaped(text: str, encoding: str = "utf-8") -> str:
    """The same where it can be written so; what cannot, such as a byte of a file's name, as ``\\udce9``."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def as_row(key: str, name: str, captions: list[WrittenCaption], error: str) -> dict[str, Any]:
    """A picture's line: under `key` its name; then its best caption, the reason if there is none, and all captions."""
    return {
        key: name,
        "caption": captions[0].text if captions else "",
        "error": error,
        "captions": [written.as_row() for written in captions],
    }


class CaptioningBar(Progress):
    """A bar on stderr with pictures a second and the time left; nothing where stderr is no terminal.

    Args:
        what: stands before it.
        total: the work, in any unit.

    Attributes:
        pictures: captioned so far.
    """

    def __init__(self, what: str, total: float) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.pictures = 0
        self._bar = self.add_task(what, total=total, rate="")

    def count_picture(self, work: float) -> None:
        """One more picture, which was so much of the total."""
        self.pictures += 1
        elapsed = self.tasks[0].elapsed or 1e-9
        self.update(self._bar, advance=work, rate=f"{self.pictures / elapsed:.1f} pictures/s")

    def leave_out(self, work: float) -> None:
        """So much of the total is not to be done after all."""
        self.update(self._bar, total=(self.tasks[0].total or 0) - work)
