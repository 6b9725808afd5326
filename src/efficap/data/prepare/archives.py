"""Unpacks zip files: only into their folder, only what is wanted, and only what is not there yet."""

from __future__ import annotations

import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from efficap.data.pool import tracked
from efficap.data.prepare.download import check_space, readable
from efficap.errors import InputError


def unpack(archive: Path, folder: Path, place: Callable[[str], str | None]) -> int:
    """Unpack those members of a zip that have a place, except those that are there with their size.

    Every file appears under its name when it is complete, so an interrupted call can be repeated.

    Args:
        place: a member's name -> its path in `folder`, or None to leave it out.

    Returns:
        How many members have a place.

    Raises:
        InputError: no zip, a damaged one, one with a link or a path out of the folder (then nothing is written), or
            not enough space on the disk.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = _members(archive, content, place)
            lacking = [
                (info, folder / target)
                for info, target in members
                if not _is_there(folder / target, info.file_size)
            ]
            size = sum(info.file_size for info, _ in lacking)
            check_space(folder, size, f"{readable(size)} from {archive.name}")
            for info, target in tracked(lacking, f"unpacking {archive.name}", len(lacking)):
                _write(content, info, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(
            f"{archive} is damaged or no zip ({error}); delete it, and it will be downloaded"
        ) from error
    return len(members)


def _members(
    archive: Path, content: zipfile.ZipFile, place: Callable[[str], str | None]
) -> list[tuple[zipfile.ZipInfo, str]]:
    members = []
    for info in content.infolist():
        if not _stays_inside(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
            raise InputError(
                f"{archive} has the member {info.filename!r}, a link or a path out of its folder; delete it"
            )
        target = None if info.is_dir() else place(info.filename)
        if target is not None:
            assert _stays_inside(target)
            members.append((info, target))
    return members


def _stays_inside(name: str) -> bool:
    # Backslashes and colons mean folders and drives on Windows only, but no data set here needs them.
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set("\\:\0") & set(name)


def _is_there(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _write(content: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.part")
    try:
        with content.open(info) as source, partial.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
