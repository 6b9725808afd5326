"""``python -m efficap.data.shards``: any caption table as webdataset tars."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from efficap.data.command_line import COLUMNS, training_command
from efficap.data.pool import cores
from efficap.data.quarantine import own_quarantine, read_quarantine
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import CaptionTable, read_table
from efficap.errors import InputError
from efficap.files import path_argument
from efficap.picture_files import MAX_PIXELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        for name, value in (
            ("--samples-per-shard", options.samples_per_shard),
            ("--short-side", options.short_side),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} {value} must be at least 1")
        settings = ShardSettings(options.samples_per_shard, options.short_side, options.max_pixels)
        tables, empties = read_table(
            options.table,
            options.image_dir,
            **{name: getattr(options, name) for name in COLUMNS},
            allow_absolute=options.allow_absolute,
        )
        splits = list(dict.fromkeys(options.split or tables))
        for split in splits:
            if split not in tables:
                raise InputError(f"--split {split}: {options.table} has {', '.join(tables)}")
            # A table may come from anywhere, and its splits become folders of OUT_DIR.
            if split in (".", "..") or any(sign in split for sign in "/\\\0"):
                raise InputError(
                    f"{options.table} has a split {split!r}, which is no name of a folder; rename it there, or choose "
                    "others with --split"
                )
        for split in splits:
            if quarantine := own_quarantine(options.table, split):
                tables[split] = _without(tables[split], quarantine)
        for split in splits:
            outcome = write_shards(tables[split], options.out_dir / split, settings, options.workers)
            others = ", ".join(
                f"{reason} {n:,}" for reason, n in outcome.most_common() if reason != "success"
            )
            print(f"{split}: {outcome['success']:,} pictures{f'; left out: {others}' if others else ''}")
        if empties:
            print(f"{len(empties):,} rows without a caption left out")
        print(_next_step(options.out_dir, splits))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the shards that are left", file=sys.stderr)
        return 130
    return 0


def _without(table: CaptionTable, quarantine: Path) -> CaptionTable:
    """A table without the pictures in its quarantine, which is told."""
    kept = table.without(read_quarantine(quarantine))
    if not len(kept):
        raise InputError(f"{quarantine} leaves out all pictures of {table.split}; mend or remove it")
    if len(kept) < len(table):
        print(f"{table.split}: {len(table) - len(kept):,} pictures in {quarantine} are left out")
    return kept


def _next_step(out_dir: Path, splits: Sequence[str]) -> str:
    """How to train on the splits that were written; by other names only the reader knows which is for what."""
    if not {"train", "val"} <= set(splits):
        return (
            f"{out_dir} has {', '.join(splits)}: train on one with data.shards={out_dir}/SPLIT and validate on another "
            "with data.val_shards, both with data.caption_field=captions"
        )
    settings = {"train": "shards", "val": "val_shards", "test": "test_shards"}
    folders = {setting: out_dir / split for split, setting in settings.items() if split in splits}
    return f"Train with:\n{training_command('webdataset', **folders, caption_field='captions')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efficap.data.shards",
        description="Write a caption table and its pictures as webdataset tars, a folder for each split.",
        epilog="The same command again goes on where it was stopped.",
    )
    parser.add_argument(
        "table",
        type=path_argument,
        help="CSV, TSV, Parquet, COCO's or Karpathy's JSON, or Flickr's token file",
    )
    parser.add_argument("image_dir", type=path_argument, help="what its picture names are relative to")
    parser.add_argument(
        "--allow-absolute",
        action="store_true",
        help="pictures may lie outside of it, as data.allow_absolute says",
    )
    parser.add_argument("out_dir", type=path_argument, help="gets OUT_DIR/<split>/00000.tar and so on")
    parser.add_argument("--split", action="append", help="only this one; may be given several times")
    parser.add_argument(
        "--samples-per-shard", type=int, default=10_000, metavar="N", help="pictures (default: 10000)"
    )
    parser.add_argument(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="resize larger pictures to it, as JPEGs (default: copy the files)",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="leave larger pictures out"
    )
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes")
    for name, default in COLUMNS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, default=default, metavar="NAME", help=f"(default: {default})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
