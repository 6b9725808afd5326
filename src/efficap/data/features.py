"""Feature maps of pictures on disk: computed once by a frozen encoder, memory-mapped ever after.

C channels, h x w positions of a feature map.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficap.data.pictures import PictureError
from efficap.errors import InputError

MAPS_FILE = "maps.bfloat16"
INDEX_FILE = "pictures.jsonl"

Stamp = tuple[str, int, int]  # a picture's name in its table, its bytes, the time of its last change in ns


def stamp(name: str, file: Path) -> Stamp | None:
    """What tells a picture from what it was before a change; None where it cannot be found."""
    try:
        found = file.stat()
    except OSError:
        return None
    return name, found.st_size, found.st_mtime_ns


class FeatureStore:
    """A file of bfloat16 feature maps, and a file with a line for each that says which picture it is of.

    A map is on the disk before its line is written, so a line vouches for its map. What a killed process leaves
    behind the last good line, whole maps or halves of a map or a line, is never read and cut off by the next writer.
    A picture that has changed gets a map behind the others. A map lies there position after position, as the encoder
    makes it and the projection reads it.

    Args:
        folder: of both files; it is made when there is something to write.
        shape: (C, h, w).

    Raises:
        InputError: there is such a folder and it cannot be read.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.folder, self.shape = folder, shape
        self.bytes_each = 2 * math.prod(shape)
        self._writing: tuple[FileIO, FileIO] | None = None
        with self._failures_named("read"):
            self._read()

    def _read(self) -> None:
        self._rows: dict[Stamp, int] = {}
        self._good_index_bytes = self._good_rows = 0
        maps, index = self.folder / MAPS_FILE, self.folder / INDEX_FILE
        if not (maps.exists() and index.exists()):
            return
        lines = index.read_bytes().splitlines(keepends=True)
        for row, line in enumerate(lines[: maps.stat().st_size // self.bytes_each]):
            picture = _parsed(line)
            if picture is None:
                return
            self._rows[picture] = row
            self._good_rows, self._good_index_bytes = row + 1, self._good_index_bytes + len(line)

    def lacking(self, pictures: Sequence[Stamp | None]) -> list[int]:
        """The places of those pictures that have no map."""
        return [place for place, picture in enumerate(pictures) if picture not in self._rows]

    def maps_of(self, pictures: Iterable[Stamp | None]) -> FeatureMaps:
        """The maps of pictures, in their order."""
        rows = [-1 if picture is None else self._rows.get(picture, -1) for picture in pictures]
        return FeatureMaps(self.folder / MAPS_FILE, self.shape, np.array(rows, np.int64))

    def check_room(self, pictures: int) -> None:
        """Raise InputError where the disk has no room for the maps of so many pictures more."""
        needed, free = pictures * self.bytes_each, shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"data.feature_cache=true needs {needed / 2**30:,.2f} GiB for {pictures:,} pictures, and {self.folder} "
                f"has {free / 2**30:,.2f} GiB free; name a folder on another disk with data.feature_cache_dir=DIR, "
                "or do without: data.feature_cache=false"
            )

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Within it maps can be appended; one process at a time, the others wait and then find what it wrote.

        Raises:
            InputError: the folder cannot be written to.
        """
        with contextlib.ExitStack() as stack:
            with self._failures_named("written"):
                self.folder.mkdir(parents=True, exist_ok=True)
                index = stack.enter_context(FileIO(self.folder / INDEX_FILE, "ab"))
                maps = stack.enter_context(FileIO(self.folder / MAPS_FILE, "ab"))
                self._lock(index)
                self._read()
                index.truncate(self._good_index_bytes)
                maps.truncate(self._good_rows * self.bytes_each)
            self._writing = index, maps
            try:
                yield
            finally:
                self._writing = None

    def _lock(self, index: FileIO) -> None:
        try:
            fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process writes to {self.folder}; waiting until it is done", file=sys.stderr)
            fcntl.flock(index, fcntl.LOCK_EX)

    def append(self, pictures: Sequence[Stamp], maps: Tensor) -> None:
        """Write the (B, C, h, w) maps of B pictures, rounded to bfloat16; only within `writing`.

        Raises:
            InputError: they cannot be written, as the disk is full.
        """
        assert self._writing is not None
        assert maps.shape == (len(pictures), *self.shape), (maps.shape, self.shape)
        index_file, maps_file = self._writing
        rows = maps.to("cpu", torch.bfloat16).permute(0, 2, 3, 1).contiguous()  # (B, h, w, C)
        lines = b"".join(json.dumps(picture).encode() + b"\n" for picture in pictures)
        with self._failures_named("written"):
            _write_all(maps_file, rows.view(torch.uint16).numpy().data.cast("B"))
            os.fsync(maps_file.fileno())  # or a power cut could leave the line without the map
            _write_all(index_file, memoryview(lines))
        for picture in pictures:
            self._rows[picture] = self._good_rows
            self._good_rows += 1

    @contextlib.contextmanager
    def _failures_named(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"the feature cache {self.folder} cannot be {done} ({error.strerror or error}); name another folder "
                "with data.feature_cache_dir=DIR, or do without: data.feature_cache=false"
            ) from error


def _write_all(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _parsed(line: bytes) -> Stamp | None:
    """The picture that a line names; None for what is no whole line."""
    if not line.endswith(b"\n"):
        return None
    try:
        name, size, mtime_ns = json.loads(line)
    except (ValueError, TypeError):
        return None
    return name, size, mtime_ns


class FeatureMaps:
    """The memory-mapped feature maps of a split's pictures.

    Loader processes, whether forked or started anew, read the same pages: what is pickled is the file's name.

    Args:
        file: of a `FeatureStore`.
        shape: (C, h, w).
        rows: (N,) which of the file's maps each picture has, -1 where it has none.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], rows: NDArray[np.int64]) -> None:
        self.file, self.shape, self.rows = file, shape, rows
        self._open()

    def _open(self) -> None:
        count = int(self.rows.max(initial=-1)) + 1
        channels, height, width = self.shape
        self._maps = torch.empty(0, *self.shape, dtype=torch.bfloat16)  # (R, C, h, w)
        if count:
            mapped = np.memmap(self.file, np.uint16, "r", shape=(count, height, width, channels))
            with warnings.catch_warnings():  # that torch would let one write to it; nobody does
                warnings.filterwarnings("ignore", message=".*not writable")
                self._maps = torch.from_numpy(mapped).view(torch.bfloat16).permute(0, 3, 1, 2)

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "shape": self.shape, "rows": self.rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __getitem__(self, place: int) -> Tensor:
        """A picture's (C, h, w) bfloat16 map, to be read and not to be written to.

        Raises:
            PictureError: it has none, as its picture could not be read.
        """
        row = int(self.rows[place])
        if row < 0:
            raise PictureError("not encoded", "it could not be read when the features were cached")
        return self._maps[row]
