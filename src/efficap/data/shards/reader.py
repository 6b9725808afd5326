"""Single samples out of many indexed tars, by number, in flat memory.

S shards, N samples in them.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from efficap.data.patience import TooSlowError, within
from efficap.data.shards.examine import IndexHeader, captions_of, decode_json, decode_text
from efficap.data.shards.index import read_samples
from efficap.data.shards.tar import BLOCK, SampleError, fingerprint
from efficap.data.text import CaptionText

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture as it lies in a tar, with its captions.

    Attributes:
        number: among all samples of the reader.
        image: its encoded bytes.
        width, height: as shown, in pixels.
        dali: whether DALI decodes it.
        captions: cleaned, empty ones left out.
    """

    number: int
    image_id: str
    image: bytes
    width: int
    height: int
    dali: bool
    captions: list[str]


class ShardReader:
    """Reads samples by number. May be used from several threads.

    Args:
        tars: the shards.
        headers: of their indexes, which are valid.
        index_dir: where the indexes lie; None: beside the tars.
        caption_field: of the json; None takes the .txt.
        text: cleans the captions.
        timeout: seconds that reading a member may take; None: any.
        most_open: tars that are held open, with the pages of their indexes.

    Attributes:
        counts: (S,) good samples in each shard.
        counted: (N,) whether what was left out of a sample's captions, or cut, has been counted; it comes round again.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        headers: Sequence[IndexHeader],
        *,
        index_dir: Path | None,
        caption_field: str | None,
        text: CaptionText,
        timeout: float | None = None,
        most_open: int = 16,
    ) -> None:
        self.timeout = timeout
        self.tars, self.index_dir, self.caption_field, self.text = list(tars), index_dir, caption_field, text
        self.counts: NDArray[np.int64] = np.array([header.good for header in headers], np.int64)
        self._ends = np.cumsum(self.counts)  # (S,)
        self.counted: NDArray[np.bool_] = np.zeros(len(self), bool)
        self.most_open = most_open
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, number: int) -> str:
        """Tar and key of a sample."""
        shard, row = self._place(number)
        return f"{self.tars[shard]}: {self._shard(shard).text('key', row)}"

    def image_id(self, number: int) -> str:
        shard, row = self._place(number)
        return self._shard(shard).text("image_id", row)

    def read(self, number: int) -> Sample:
        """One sample.

        Raises:
            SampleError: the tar is no longer what was indexed, is too slow, or has no caption where one is looked for.
        """
        try:
            return self._read(number)
        except SampleError as error:
            if error.reason != "no access":
                raise
        # On a network's disk, a file in whose place another was put is lost to who has it open.
        with self._lock:
            self._open.pop(self._place(number)[0], None)
        return self._read(number)

    def _read(self, number: int) -> Sample:
        shard, row = self._place(number)
        shards = self._shard(shard)
        image = shards.member("image", row)
        return Sample(
            number,
            shards.text("image_id", row),
            image,
            shards.number("width", row),
            shards.number("height", row),
            bool(shards.number("dali", row)),
            self._captions(shards, row),
        )

    def captions(self, number: int) -> list[str]:
        """The captions of a sample alone; raises as `read`."""
        shard, row = self._place(number)
        return self._captions(self._shard(shard), row)

    def _captions(self, shard: _OpenShard, row: int) -> list[str]:
        if self.caption_field is None:
            captions = [decode_text(shard.member("text", row))]
        else:
            captions = captions_of(decode_json(shard.member("json", row)), self.caption_field)
        cleaned = [caption for caption in map(self.text.clean, captions) if caption]
        if not cleaned:
            raise SampleError("empty caption")
        return cleaned

    def _place(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.counts[shard])

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            shard = self._open.get(number)
            if shard is None:
                where = (self.tars[number], self.index_dir, int(self.counts[number]), self.timeout)
                shard = self._open[number] = _answer(self.timeout, _OpenShard, *where)
                if len(self._open) > self.most_open:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(number)
            return shard


def _answer(timeout: float | None, function: Callable[..., Result], *arguments: Any) -> Result:
    """What `function` returns of a disk; raises SampleError where that fails, or takes too long."""
    try:
        return within(timeout, function, *arguments)
    except TooSlowError as error:
        raise SampleError("too slow", str(error)) from None
    except OSError as error:
        raise SampleError("no access", str(error)) from error


class _OpenShard:
    """A tar that is open, and its index."""

    def __init__(self, tar: Path, index_dir: Path | None, count: int, timeout: float | None) -> None:
        self._timeout = timeout
        self._file = tar.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        rows = read_samples(tar, index_dir)
        if rows.num_rows != count:
            raise SampleError(
                "changed tar",
                f"its index has {rows.num_rows} samples and had {count}; another program wrote it",
            )
        self._columns: dict[str, Any] = {}
        for name in rows.column_names:
            column = rows[name].chunk(0)
            self._columns[name] = column if name in ("key", "image_id") else column.to_numpy()

    def text(self, column: str, row: int) -> str:
        return str(self._columns[column][row].as_py())

    def number(self, column: str, row: int) -> int:
        return int(self._columns[column][row])

    def member(self, name: str, row: int) -> bytes:
        """The data of a sample's member.

        The tar's own header before them is read with them: should the tar have changed since its index was made, this
        sample fails, instead of lending its caption to another picture.
        """
        offset, size = self.number(f"{name}_offset", row), self.number(f"{name}_size", row)
        if offset < 0:
            raise SampleError("no caption", f"no .{'txt' if name == 'text' else name}")
        if not (offset >= BLOCK and 0 <= size <= self._size - offset):  # before there is memory for them
            raise SampleError("changed tar", "its index tells of more than it holds; remove the index")
        data = _answer(self._timeout, os.pread, self._file.fileno(), BLOCK + size, offset - BLOCK)
        unchanged = fingerprint(data[:BLOCK]) == self.number(f"{name}_header", row)
        if len(data) != BLOCK + size or not unchanged:
            raise SampleError("changed tar", "its index no longer fits; it is made anew at the next start")
        return data[BLOCK:]
