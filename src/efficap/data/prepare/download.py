"""Fetches files over HTTP: several at once, resumed after a break, verified before they get their names.

The standard library serves: what is needed beyond it (resuming, verifying) no client brings along either.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from efficap.data.prepare.transfer import (
    BrokenTransferError,
    DownloadError,
    StoppedError,
    continue_part,
    remote_size,
    source_of,
)
from efficap.errors import InputError

_BLOCK = 1 << 20  # bytes hashed at a time


@dataclass(frozen=True, slots=True)
class Remote:
    """A file on a server.

    Attributes:
        url: http or https.
        name: what it is called here.
        size: bytes; None where no source gives it.
        sha256, md5: hexadecimal; without either, nothing but the size is verified.
        unpacked: about how many bytes come out of it; 0 for what is no archive.
    """

    url: str
    name: str
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    unpacked: int = 0


def fetch(
    files: Sequence[Remote], folder: Path, *, connections: int = 4, attempts: int = 5, pause: float = 1.0
) -> list[Path]:
    """Have files in a folder: those that are there already are verified, the others downloaded.

    A download grows in ``NAME.part`` and gets its name when it is complete and verified. After a break, or in the
    next call, it goes on where it ended if the server can and still has the same file, else from the start.

    Args:
        connections: files downloaded at the same time.
        attempts: how often in a row a transfer may break without getting any further.
        pause: seconds before the second attempt; doubled before each further one, up to a minute.

    Returns:
        Where the files are, in their order.

    Raises:
        InputError: not enough space on the disk (told before anything is downloaded), or a file that is there but is
            not the expected one.
        DownloadError: an InputError too; no such file on the server, no connection, or not the expected file.
    """
    for remote in files:
        if urlsplit(remote.url).scheme not in ("http", "https"):
            raise InputError(f"{remote.url} must begin with http:// or https://")
    with _progress() as progress:
        missing = [remote for remote in files if not _is_there(remote, folder / remote.name, progress)]
        if missing:
            _check_space_for(missing, folder)
            folder.mkdir(parents=True, exist_ok=True)
            names = ", ".join(remote.name for remote in missing)  # a log has no progress bar to show them
            progress.console.print(
                f"downloading {names} to {folder}", soft_wrap=True, highlight=False, markup=False
            )
            _fetch_all(missing, folder, progress, connections, attempts, pause)
    return [folder / remote.name for remote in files]


def readable(size: float) -> str:
    """A number of bytes as people write it: ``13.5 GB``."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size:.0f} bytes"


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_space(folder: Path, size: int, what: str) -> None:
    """Raise InputError where fewer bytes are free than are needed for `what`."""
    free = free_space(folder)
    if size > free:
        raise InputError(
            f"{folder}: {readable(size)} are needed ({what}) and {readable(free)} are free; "
            "free some, or name a folder on another disk with --dir"
        )


def _check_space_for(files: Sequence[Remote], folder: Path) -> None:
    download = 0
    for remote in files:
        part = folder / f"{remote.name}.part"
        size = remote.size or remote_size(remote.url) or 0
        download += max(size - (part.stat().st_size if part.exists() else 0), 0)
    unpacked = sum(remote.unpacked for remote in files)
    check_space(
        folder, download + unpacked, f"{readable(download)} of downloads, about {readable(unpacked)} unpacked"
    )


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _is_there(remote: Remote, file: Path, progress: Progress) -> bool:
    if not file.exists():
        return False
    fault = _fault(remote, file, progress)
    if fault:
        raise InputError(f"{file} is there, but {fault}; delete or rename it, and it will be downloaded")
    return True


def _fault(remote: Remote, file: Path, progress: Progress) -> str | None:
    """What is wrong with a file, of what is known about it."""
    size = file.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"it has {size:,} bytes instead of {remote.size:,}"
    for name, expected in (("sha256", remote.sha256), ("md5", remote.md5)):
        if expected is None:
            continue
        # MD5 serves where no other checksum has been published: it finds damage, if not malice.
        digest = hashlib.new(name, usedforsecurity=False)
        task = progress.add_task(f"checking {remote.name}", total=size)
        with file.open("rb") as content:
            while block := content.read(_BLOCK):
                digest.update(block)
                progress.advance(task, len(block))
        progress.remove_task(task)
        if digest.hexdigest() != expected.lower():
            return f"its {name} is {digest.hexdigest()} instead of {expected}"
    return None


def _fetch_all(
    files: Sequence[Remote], folder: Path, progress: Progress, connections: int, attempts: int, pause: float
) -> None:
    stop = Event()
    with ThreadPoolExecutor(connections) as threads:
        jobs = [
            threads.submit(_fetch_one, remote, folder, progress, stop, attempts, pause) for remote in files
        ]
        try:
            done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # after an error or Ctrl-C, the other downloads end too and can be resumed
            threads.shutdown(cancel_futures=True)
        errors = [error for job in done if (error := job.exception())]
        if errors:
            raise errors[0]


def _fetch_one(
    remote: Remote, folder: Path, progress: Progress, stop: Event, attempts: int, pause: float
) -> None:
    file = folder / remote.name
    part = folder / f"{remote.name}.part"
    task = progress.add_task(remote.name, total=remote.size)

    def report(completed: int, total: int | None) -> None:
        progress.update(task, completed=completed, total=total)

    _complete(remote, part, report, stop, attempts, pause)
    progress.remove_task(task)
    fault = _fault(remote, part, progress)
    source_of(part).unlink(missing_ok=True)
    if fault:
        part.unlink()
        raise DownloadError(
            f"{remote.url}: {fault}: damaged on the way, or another file by now; what was downloaded has been removed"
        )
    os.replace(part, file)


def _complete(
    remote: Remote,
    part: Path,
    report: Callable[[int, int | None], None],
    stop: Event,
    attempts: int,
    pause: float,
) -> None:
    failures, farthest = 0, 0
    while True:
        try:
            return continue_part(remote.url, part, remote.size, report, stop)
        except BrokenTransferError as error:
            reached = part.stat().st_size if part.exists() else 0
            # A long download over a bad line breaks often; what counts is whether it gets any further.
            failures = 1 if reached > farthest else failures + 1
            farthest = max(farthest, reached)
            if failures >= attempts:
                raise DownloadError(
                    f"{remote.url}: {error}, {failures} times in a row; run the same command again to go on"
                ) from error
            if stop.wait(min(pause * 2 ** (failures - 1), 60)):
                raise StoppedError from error
