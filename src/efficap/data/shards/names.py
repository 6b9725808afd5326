"""Which tars a setting means: brace lists, globs, directories, in any mixture."""

from __future__ import annotations

import glob
import itertools
import re
from pathlib import Path

from braceexpand import braceexpand

from efficap.errors import InputError

MOST = 1_000_000  # shards; more are a slip of the keyboard


def find_shards(shards: str | list[str], setting: str) -> list[Path]:
    """The tars that `shards` means, absolute and sorted by name.

    Args:
        shards: ``cc3m/{00000..00331}.tar``, ``cc3m/*.tar``, a directory (not walked), one tar, or a list of these.
        setting: what an error calls it, such as ``data.shards``.

    Raises:
        InputError: nothing is found, or a tar that is named does not exist.
    """
    words = [shards] if isinstance(shards, str) else list(shards)
    found: list[Path] = []
    for word in words:
        found += _expand(str(Path(word).expanduser()), setting)
    unique = sorted({path.absolute() for path in found})
    if not unique:
        raise InputError(f"{setting} names no shards: give tars, as cc3m/{{00000..00331}}.tar")
    return unique


def _expand(word: str, setting: str) -> list[Path]:
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}", word)
    # braceexpand would hold all names of a range in memory before it gives the first.
    if any(abs(int(last) - int(first)) >= MOST for first, last in ranges):
        raise InputError(f"{setting}={word} stands for more than {MOST:,} shards")
    try:
        names = list(itertools.islice(braceexpand(word), MOST + 1))
    except ValueError as error:
        raise InputError(f"{setting}={word}: {error}") from error
    if len(names) > MOST:
        raise InputError(f"{setting}={word} stands for more than {MOST:,} shards")
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            tars = [tar for tar in path.glob("*.tar") if tar.is_file()]
        elif glob.has_magic(name) and not path.is_file():
            tars = [Path(tar) for tar in glob.glob(name, recursive=True) if Path(tar).is_file()]
        else:
            tars = [path] if path.is_file() else []
        found += tars
        if not tars:
            missing.append(name)
    if not found:
        raise InputError(f"{setting}={word} matches no tar; {_what_is_there(Path(names[0]))}")
    if missing:
        raise InputError(
            f"{setting}={word}: {len(missing):,} of {len(names):,} do not exist, the first is {missing[0]}; "
            f"{setting}={Path(missing[0]).parent} takes all tars that are there"
        )
    if odd := [path for path in found if path.suffix != ".tar"]:
        raise InputError(f"{setting}={word}: {odd[0]} is no .tar; unpack compressed ones first")
    return found


def _what_is_there(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():
        folder = folder.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in itertools.islice(folder.iterdir(), 1000))
    there = ", ".join(names[:5]) + (", …" if len(names) > 5 else "") if names else "nothing"
    return f"{folder.absolute()} holds {there}"
