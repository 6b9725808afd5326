"""Files that are written whole or not at all, and paths of a command line."""

from __future__ import annotations

import argparse
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` when the block ends well; else `path` stays as it was.

    Raises:
        OSError: the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the same folder: a rename stays atomic
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """The same as a file that is open for bytes."""
    with unfinished(path) as temporary, temporary.open("wb") as file:
        yield file


def path_argument(text: str) -> Path:
    """A path of a command line, for argparse; of ``--dir=~/data`` a shell leaves the ``~`` as it is.

    Raises:
        ArgumentTypeError: nobody has the home that it names.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: there is no such home") from error
