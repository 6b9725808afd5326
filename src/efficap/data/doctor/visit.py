"""One run of the doctor, from its options to the last file written."""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

from rich.console import Console
from rich.text import Text

from efficap.data.command_line import COLUMNS, training_command
from efficap.data.doctor.captions import CaptionLimit, load_tokenizer
from efficap.data.doctor.comparison import compare
from efficap.data.doctor.diagnosis import Diagnosis, conclude
from efficap.data.doctor.examination import Examination
from efficap.data.doctor.files import write_text
from efficap.data.doctor.page import as_page
from efficap.data.doctor.quarantine import crossing_rows, write_quarantine
from efficap.data.doctor.report import print_diagnosis, write_json
from efficap.data.doctor.shard_pass import examine_shards
from efficap.data.doctor.table_pass import examine_table
from efficap.data.shards.names import find_shards
from efficap.errors import InputError
from efficap.picture_files import MAX_PIXELS


def visit(options: argparse.Namespace) -> bool:
    """Look through what the options name, print and write the report and what training uses.

    Returns:
        Whether anything was found.

    Raises:
        InputError: an option that cannot be, or data that cannot be looked through at all.
    """
    _check(options)
    path, console = Path(options.path), Console()
    tars = find_shards(options.path, "PATH") if _means_shards(options.path) else []
    seen = _examine_tars(tars, options) if tars else _examine_table(path, options)
    comparison = compare(seen)
    diagnosis = conclude(options.path, seen)
    if not tars:
        rows = list(seen.unreadable)
        if options.quarantine_duplicates:
            rows += crossing_rows(seen, comparison.crossing, options.train_split)
        quarantine = write_quarantine(path, rows)
        if quarantine is not None:
            diagnosis.files.append(str(quarantine))
    out = options.out or (tars[0] if tars else path).parent / "doctor"
    write_json(out / "report.json", diagnosis)
    page = as_page(diagnosis, seen, comparison.exhibits)
    write_text(out / "report.html", page, "name another folder with --out DIR")
    print_diagnosis(diagnosis, console)
    for line in _what_next(options, diagnosis, out):
        console.print(Text(line), soft_wrap=True)
    return bool(diagnosis.findings)


def _check(options: argparse.Namespace) -> None:
    for name in ("max_words", "max_tokens", "max_pixels", "workers"):
        value, least = getattr(options, name), 3 if name == "max_tokens" else 1
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least {least}")
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer)  # a wrong name is told before anything is looked at


def _means_shards(path: str) -> bool:
    if Path(path).is_file():
        return path.lower().endswith(".tar")
    return Path(path).is_dir() or "{" in path or glob.has_magic(path) or path.endswith(".tar")


def _limits(options: argparse.Namespace) -> tuple[CaptionLimit, int]:
    limit = CaptionLimit(options.max_words, options.max_tokens, options.tokenizer)
    return limit, MAX_PIXELS if options.max_pixels is None else options.max_pixels


def _examine_tars(tars: list[Path], options: argparse.Namespace) -> Examination:
    if options.quarantine_duplicates:
        raise InputError("--quarantine-duplicates is for tables; of shards, training reads the indexes alone")
    limit, max_pixels = _limits(options)
    return examine_shards(
        tars, index_dir=options.index_dir, limit=limit, max_pixels=max_pixels, workers=options.workers
    )


def _examine_table(table: Path, options: argparse.Namespace) -> Examination:
    limit, max_pixels = _limits(options)
    return examine_table(
        table,
        _image_dir(table, options),
        columns={name: getattr(options, name) for name in COLUMNS},
        allow_absolute=options.allow_absolute,
        limit=limit,
        max_pixels=max_pixels,
        workers=options.workers,
    )


def _image_dir(table: Path, options: argparse.Namespace) -> Path:
    if options.image_dir is not None:
        folder: Path = options.image_dir
        return folder
    beside = table.parent / "images"
    return beside if beside.is_dir() else table.parent


def _what_next(options: argparse.Namespace, diagnosis: Diagnosis, out: Path) -> list[str]:
    lines = []
    if diagnosis.kind == "shards":
        place = f"in {options.index_dir}" if options.index_dir else "beside each shard"
        lines.append(f"Indexes that training uses: {place}")
        index_dir = {"index_dir": options.index_dir} if options.index_dir else {}
        command = f"{training_command('webdataset', shards=options.path, **index_dir)} data.val_shards=…"
    else:
        lines += [f"Pictures that training leaves out: {file}" for file in diagnosis.files]
        table = Path(options.path)
        defaults = {**COLUMNS, "train_split": "train"}
        given = {
            name: getattr(options, name)
            for name, default in defaults.items()
            if getattr(options, name) != default
        }
        if options.allow_absolute:
            given["allow_absolute"] = "true"
        command = training_command("csv", table=table, image_dir=_image_dir(table, options), **given)
    return [*lines, f"Report: {out / 'report.html'}", f"Train: {command}"]
