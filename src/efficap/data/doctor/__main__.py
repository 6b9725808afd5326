"""``python -m efficap.data.doctor PATH``: look through a data set before training on it."""

from __future__ import annotations

import argparse
import sys

from efficap.data.command_line import COLUMNS
from efficap.data.pool import cores
from efficap.errors import InputError
from efficap.files import path_argument

FINDINGS = 3  # the exit status of --strict


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        from efficap.data.doctor.visit import visit  # torch, pandas and Arrow: --help can do without

        found = visit(options)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing is reported", file=sys.stderr)
        return 130
    return FINDINGS if found and options.strict else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m efficap.data.doctor",
        description="Look through a captioning data set: unreadable pictures, broken shards, empty and overlong "
        "captions, pictures that occur twice or in two splits, bars of one colour, samples that a download lost.",
        epilog="Writes report.html, report.json and what training uses: for a.csv an a.quarantine.csv beside "
        "it, the pictures to leave out (an older one is replaced, or removed when there are none); for shards an index "
        "of each. Exit status: 0, findings or not; 1 where PATH cannot be looked through; 2 for a wrong option; "
        f"{FINDINGS} with --strict where something was found.",
    )
    add = parser.add_argument
    add(
        "path",
        type=lambda text: str(path_argument(text)),  # it may be a pattern of shards
        metavar="PATH",
        help="a table (CSV, TSV, Parquet, JSON, Flickr's tokens), or shards: a folder of tars, a tar, a/{000..331}.tar",
    )
    add(
        "--image-dir",
        type=path_argument,
        metavar="DIR",
        help="of a table (default: images/ beside it, or its own folder)",
    )
    add(
        "--allow-absolute",
        action="store_true",
        help="pictures may lie outside of it, as data.allow_absolute says",
    )
    for name, default in COLUMNS.items():
        add(
            f"--{name.replace('_', '-')}",
            default=default,
            metavar="NAME",
            help="of a table (default: %(default)s)",
        )
    add(
        "--train-split",
        default="train",
        metavar="NAME",
        help="the split that is learned from (default: train)",
    )
    add(
        "--quarantine-duplicates",
        action="store_true",
        help="leave out, too, pictures of the training split that occur in another split",
    )
    add(
        "--index-dir",
        type=path_argument,
        metavar="DIR",
        help="where indexes of shards go (default: beside each)",
    )
    add(
        "--max-words",
        type=int,
        default=40,
        metavar="N",
        help="of a caption; longer ones are reported (default: 40)",
    )
    add("--tokenizer", metavar="NAME_OR_DIR", help="count the tokens of captions, instead of their words")
    add(
        "--max-tokens",
        type=int,
        default=40,
        metavar="N",
        help="of a caption where --tokenizer is given, BOS and EOS counted (default: 40)",
    )
    add(
        "--max-pixels",
        type=int,
        metavar="N",
        help="larger pictures count as unreadable (default: 178,956,970)",
    )
    add(
        "--out",
        type=path_argument,
        metavar="DIR",
        help="for the report (default: doctor/ beside the table or the shards)",
    )
    add(
        "--workers",
        type=int,
        default=cores(),
        metavar="N",
        help="processes (default: one a core, %(default)s here)",
    )
    add("--strict", action="store_true", help=f"exit with status {FINDINGS} where something was found")
    return parser


if __name__ == "__main__":
    sys.exit(main())
