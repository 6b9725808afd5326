"""A folder for an example's files, and beside it one that nothing may touch; what a process opens is watched.

Python's own audit events tell what is opened, written, removed, started and connected to. Libraries in C++ and Rust
open files by themselves: of those tell the times at which the canaries were last read, and what lies beside them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

CHECKOUT = Path(__file__).parents[2]
READABLE = [sys.prefix, sys.base_prefix, str(CHECKOUT), "/proc", "/sys", "/dev", "/etc", "/usr", "/lib"]
WRITTEN_BY_PYTHON = ("/dev/null", "/dev/shm")
PROGRAMS = ("git", "java", "lsb_release", "ldconfig", "uname")  # that a training asks of the machine it is on
CHANGES = {
    "os.remove": 1,
    "os.rename": 2,
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.chmod": 1,
    "shutil.rmtree": 1,
}
SECRET = "hunter2-hunter2"  # in the environment; no page and no message may hold it

_watched: list[tuple[str, str]] | None = None  # (what, path), while a sandbox watches


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if _is_path(path):
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(
                mode and set(mode) & set("wax+")
            )
            _watched.append(("write" if writes else "read", os.path.realpath(os.fsdecode(path))))
    elif event in CHANGES:
        for path in map(os.fsdecode, filter(_is_path, arguments[: CHANGES[event]])):
            if os.path.isabs(path):  # else in a folder that was opened, as told above
                folder, name = os.path.split(path)  # what a link leads to is not changed
                _watched.append(("write", os.path.join(os.path.realpath(folder), name)))
    elif event == "subprocess.Popen" or event == "os.system":
        _watched.append(("start", str(arguments[0])))
    elif event == "socket.connect":
        _watched.append(("connect", str(arguments[1])))


def _is_path(value: object) -> bool:
    return isinstance(value, str | bytes)


sys.addaudithook(_hear)


class Sandbox:
    """Two folders of a temporary one.

    Args:
        folder: a new one.

    Attributes:
        root: an example's own files; the current folder while it is watched.
        outside: canaries, beside it: a picture, a table, a run's files.
        tells_reads: whether the disk notes when a file was last read.
    """

    def __init__(self, folder: Path) -> None:
        self.root, self.outside, self._temporary = (folder / name for name in ("root", "outside", "tmp"))
        for made in (self.outside, self._temporary):
            made.mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(self.outside / "canary.png")
        (self.outside / "canary.csv").write_text("file_name,caption,split\ncanary.png,a canary,train\n")
        for name in ("canary.txt", "config.yaml", "tokenizer.json", "model.safetensors", "encoder.pth"):
            (self.outside / name).write_text("canary")
        self._set_back()
        (self.outside / "canary.txt").read_text()
        self.tells_reads = (self.outside / "canary.txt").stat().st_atime != 1
        self._set_back()

    def _set_back(self) -> None:
        for file in self.outside.iterdir():
            os.utime(
                file, (1, 2)
            )  # read before it was written: the next reading is noted on any disk that does

    def _state(self) -> dict[str, tuple[int, float, float]]:
        files = sorted(self.outside.rglob("*"))
        return {
            str(file): (found.st_size, found.st_mtime, found.st_atime)
            for file in files
            for found in [file.stat()]
        }

    def clear(self) -> None:
        """Begin an example."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Raises AssertionError where the block read, wrote, started or connected to what it may not."""
        global _watched
        before, folder, temporary = self._state(), os.getcwd(), tempfile.tempdir
        tempfile.tempdir = str(self._temporary)
        os.environ["A_SECRET_KEY"] = SECRET
        os.chdir(self.root)
        _watched = watched = []
        try:
            yield
        finally:
            _watched = None
            os.chdir(folder)
            tempfile.tempdir = temporary
        assert self._state() == before, "a file outside of the root was read or written"
        bad = [entry for entry in watched if not self._is_allowed(*entry)]
        assert not bad, bad[:5]

    def _is_allowed(self, what: str, path: str) -> bool:
        own = [str(self.root.resolve()), str(self._temporary.resolve())]
        if what == "start":
            return os.path.basename(path) in PROGRAMS
        if what == "connect":
            return path.startswith("/") or "127.0.0.1" in path
        if what == "write":
            return path.startswith((*own, *WRITTEN_BY_PYTHON)) or "__pycache__" in path
        return path.startswith((*own, *READABLE))
