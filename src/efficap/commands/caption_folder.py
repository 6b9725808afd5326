"""Caption picture files: the results of a folder are kept line by line, so that a later start goes on after them.

One process at a time; several can share shards (`efficap.commands.caption_shards`), and not a folder of pictures.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from efficap.commands.caption_output import RECORD, as_row, check_folder, escaped, keep_record
from efficap.data.pictures import Picture, PictureError
from efficap.data.transforms import EvaluationTransform
from efficap.errors import InputError
from efficap.evaluation.attention import Word
from efficap.evaluation.report import GalleryItem, write_gallery
from efficap.files import replacing
from efficap.picture_files import SUFFIXES
from efficap.training.writer import WrittenCaption

POINTING = (
    "Point at a word: the picture stays bright where the model looked as it wrote it. "
    "The stronger a word is shaded, the less sure the model was of it."
)
_TEXT = ("utf-8", "surrogateescape")  # a file's name need not be UTF-8


@dataclass(frozen=True, slots=True)
class CaptionedFile:
    """What became of one file: its captions, the best first, or the reason why there is none.

    Attributes:
        words: of the best caption, where it was asked where the model looked.
    """

    file: Path
    captions: list[WrittenCaption] = field(default_factory=list)
    error: str = ""
    words: list[Word] = field(default_factory=list)

    @property
    def caption(self) -> str:
        return self.captions[0].text if self.captions else ""


def find_pictures(images: str, setting: str = "images") -> list[Path]:
    """The files that `images` means: itself, all pictures below a folder, or what a glob matches, sorted.

    Args:
        images: what the setting says.
        setting: its name, for messages.

    Raises:
        InputError: there is no such file, or no picture.
    """
    path = Path(images).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = list(pictures_below(path))
    else:
        found = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    if not found:
        kinds = ", ".join(suffixes[0][1:] for suffixes in SUFFIXES.values())
        what = (
            "holds no picture"
            if path.is_dir()
            else "is neither a file, nor a folder, nor a glob that matches one"
        )
        raise InputError(f"{setting}={images} {what} ({kinds})")
    return sorted(found)


def pictures_below(folder: Path) -> Iterator[Path]:
    """The files below a folder whose suffix is a picture's, in no order.

    Linked folders are walked too, after all others: each folder once, under its own path if that is below `folder`.
    """
    suffixes = {suffix for of_format in SUFFIXES.values() for suffix in of_format}
    walked: set[str] = set()
    waiting = [folder]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0)):
            if (real := os.path.realpath(place)) in walked:
                folders.clear()
                continue
            walked.add(real)
            waiting += [link for name in sorted(folders) if (link := Path(place, name)).is_symlink()]
            files = (Path(place, name) for name in names)
            yield from (file for file in files if file.suffix.lower() in suffixes and file.is_file())


class Pictures(Dataset[tuple[str, Tensor | None, str]]):
    """Each file as (name, (3, H, W) uint8, ""), or (name, None, reason)."""

    def __init__(self, files: list[Path], transform: EvaluationTransform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        file = self.files[index]
        try:
            return str(file), self.transform(Picture(file)), ""
        except PictureError as error:
            return str(file), None, str(error)


def _can_be_read(file: Path, transform: EvaluationTransform) -> bool:
    _, _, error = Pictures([file], transform)[0]
    return not error


class CaptionFolder:
    """A folder of results: captions.jsonl grows while pictures are captioned, the rest is written at the end.

    Args:
        path: the folder; it is made when there are results.
        record: what the captions are made with, kept beside them.

    Attributes:
        results: of the files that are done, by the file's name.

    Raises:
        InputError: the folder holds results that were made with something else, or that cannot be read.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self._record = path, record
        self._lines, self._table, self._page = (
            path / name for name in ("captions.jsonl", "captions.csv", "index.html")
        )
        if self._lines.exists() and not (path / RECORD).exists():
            raise InputError(
                f"{self._lines} has no {RECORD} beside it that tells what it was made with; "
                "name another folder with out=DIR"
            )
        check_folder(path, record)
        self.results = {str(result.file): result for result in _read(self._lines)}

    @property
    def is_finished(self) -> bool:
        """Whether all that is written at the end is there."""
        return self._table.exists() and self._page.exists()

    def remaining(self, files: list[Path], transform: EvaluationTransform) -> list[Path]:
        """Those of `files` that are not done, in their order; with them what could not be read, and can be now."""

        def is_done(file: Path) -> bool:
            result = self.results.get(str(file))
            return result is not None and not (result.error and _can_be_read(file, transform))

        return [file for file in files if not is_done(file)]

    def add(self, results: list[CaptionedFile]) -> None:
        """Write the lines of pictures that are done; what was made of fewer pictures is removed."""
        keep_record(self.path, self._record)
        self._page.unlink(missing_ok=True)
        self._table.unlink(missing_ok=True)
        with self._lines.open("ab") as file:
            file.write(b"".join(map(_line, results)))  # at the end of the block they are the system's to keep
        self.results |= {str(result.file): result for result in results}

    def finish(self, run_name: str, *, crop: float) -> None:
        """Put the lines in the order of the files, and write the table and the page; the page is the last.

        Args:
            crop: share of a picture's short side that the model sees, in the middle.
        """
        results = sorted(self.results.values(), key=lambda result: result.file)
        with replacing(self._lines) as file:
            file.writelines(map(_line, results))
        with replacing(self._table) as file:
            text = io.TextIOWrapper(file, *_TEXT, newline="")
            writer = csv.writer(text)
            writer.writerow(["file", "caption", "error"])
            writer.writerows([result.file, result.caption, result.error] for result in results)
            text.detach()
        pictures = [result for result in results if not result.error]
        items = (
            GalleryItem(result.file, result.caption, words=result.words, crop=crop) for result in pictures
        )
        looking = f". {POINTING}" if self._record["attention"] else ""
        write_gallery(
            self._page,
            items,
            title="Captions",
            subtitle=f"{len(pictures):,} pictures, by {run_name}{looking}",
        )


def _line(result: CaptionedFile) -> bytes:
    row = as_row("file", str(result.file), result.captions, result.error)
    if result.words:
        row["words"] = [
            {
                "text": word.text,
                "probability": _rounded(word.probability),
                "attention": None if word.attention is None else _rounded(word.attention.tolist()),
            }
            for word in result.words
        ]
    return (json.dumps(row, ensure_ascii=False) + "\n").encode(*_TEXT)


def _rounded(value: Any) -> Any:
    return [_rounded(part) for part in value] if isinstance(value, list) else float(f"{value:.4g}")


def _word(row: dict[str, Any]) -> Word:
    return Word(row["text"], row["probability"], np.array(row["attention"], np.float32))


def _read(lines: Path) -> Iterator[CaptionedFile]:
    """The results of the whole lines; one that was cut short, which can only be the last, is removed."""
    if not lines.exists():
        return
    data = lines.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(lines, whole)
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line.decode(*_TEXT))
            captions = [WrittenCaption(**written) for written in row["captions"]]
            words = [_word(word) for word in row.get("words", [])]
            yield CaptionedFile(Path(row["file"]), captions, row["error"], words)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{lines}: line {number} is no picture's ({error}); remove it, or name another folder with out=DIR"
            ) from error


def print_outcome(path: Path, results: list[CaptionedFile], before: int) -> None:
    """Say what became of the files, and which of them are no pictures.

    Args:
        path: the folder of the results.
        before: how many of the files an earlier start had done.
    """
    console = Console()
    failed = [result for result in results if result.error]
    lines = [(f"no picture: {result.file} ({result.error})", "yellow") for result in failed]
    earlier = f"; {before:,} of them were done before" if before else ""
    done = f"{len(results) - len(failed):,} captioned, {len(failed):,} left out{earlier}"
    lines.append((f"{done}; in {path}: index.html, captions.csv, captions.jsonl", ""))
    for text, style in lines:
        shown = escaped(text, sys.stdout.encoding or "utf-8")
        console.print(shown, style=style or None, soft_wrap=True, highlight=False, markup=False)
