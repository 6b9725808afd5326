"""Pictures with their captions as items, and items as batches.

B images, K captions of each, T tokens.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from efficap.batch import CaptionBatch
from efficap.data.features import FeatureMaps
from efficap.data.order import Key, turn
from efficap.data.pictures import Picture, PictureError
from efficap.data.table import CaptionTable
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer

ENCODED_AT_ONCE = 10_000  # captions; of COCO's 567 thousand at once, a gigabyte was never given back


class SharedRows:
    """An Arrow table in a temporary file, memory-mapped.

    Loader processes read the same pages, whether they were forked or started anew: a Python list of the same rows would
    be copied into each of them, page by page, as their reference counts change.
    """

    def __init__(self, rows: pa.Table) -> None:
        handle, self._file = tempfile.mkstemp(prefix="efficap-", suffix=".arrow")
        if sys.platform == "linux":  # a file without a name is gone with its processes, however these end
            os.unlink(self._file)
            self._file = f"/proc/{os.getpid()}/fd/{handle}"
            weakref.finalize(self, os.close, handle)
        else:
            os.close(handle)
            weakref.finalize(self, _remove, self._file, os.getpid())
        try:
            with pa.OSFile(self._file, "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
                writer.write_table(rows, max_chunksize=max(1, rows.num_rows))
        except OSError as error:
            raise InputError(
                f"{tempfile.gettempdir()} cannot hold {rows.nbytes:,} bytes of captions ({error.strerror or error}); "
                "make room, or name another folder with TMPDIR=DIR"
            ) from error
        self._open()

    def _open(self) -> None:
        with pa.memory_map(self._file) as source:
            rows = pa.ipc.open_file(source).read_all()
        self._columns = {
            name: rows[name].chunk(0) if rows.num_rows else rows[name] for name in rows.column_names
        }
        self.num_rows = rows.num_rows

    def __getstate__(self) -> str:
        return self._file

    def __setstate__(self, file: str) -> None:
        self._file = file
        self._open()

    def __len__(self) -> int:
        return int(self.num_rows)

    def __getitem__(self, place: tuple[str, int]) -> Any:
        column, row = place
        return self._columns[column][row].as_py()

    def ids(self, row: int) -> list[NDArray[np.int32]]:
        """The ids of each caption of a row."""
        captions = self._columns["tokens"][row].values
        return [caption.values.to_numpy() for caption in captions]


def _remove(file: str, owner: int) -> None:
    if os.getpid() == owner:  # and not a loader process that ends
        Path(file).unlink(missing_ok=True)


def encode_table(table: CaptionTable, tokenizer: CaptionTokenizer, max_tokens: int) -> tuple[SharedRows, int]:
    """The table with the ids of its captions in a column ``tokens``, and the number of captions that were cut."""
    references = table.rows["references"].combine_chunks()
    texts, cut = references.flatten(), 0
    lengths, ids = [np.zeros(1, np.int64)], [np.empty(0, np.int32)]
    for start in range(0, len(texts), ENCODED_AT_ONCE):
        encoded, too_long = tokenizer.encode(texts.slice(start, ENCODED_AT_ONCE).to_pylist(), max_tokens)
        lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        ids.append(np.fromiter(itertools.chain.from_iterable(encoded), np.int32))
        cut += too_long
    offsets, flat = np.cumsum(np.concatenate(lengths)), np.concatenate(ids)
    captions = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flat))
    tokens = pa.LargeListArray.from_arrays(references.offsets, captions)
    return SharedRows(table.rows.append_column("tokens", tokens)), cut


def collate_captions(captions: list[list[NDArray[np.int32]]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(B, K, T) ids and (B, K) lengths of B lists of captions; K and T are no larger than these need."""
    most = max(1, *map(len, captions))  # pictures that are only to be captioned have none
    longest = max((len(ids) for of_image in captions for ids in of_image), default=1)
    tokens = np.full((len(captions), most, longest), pad_id, np.int64)  # (B, K, T)
    lengths = np.zeros((len(captions), most), np.int64)  # (B, K)
    for b, of_image in enumerate(captions):
        for k, ids in enumerate(of_image):
            tokens[b, k, : len(ids)] = ids
            lengths[b, k] = len(ids)
    return torch.from_numpy(tokens), torch.from_numpy(lengths)


class CaptionedImages(Dataset[Any]):
    """One item a picture, a pure function of (seed, time through the data, picture).

    In training its pixels and K of its captions; in evaluation all captions, so that a loss does not depend on K.
    Where there are `features`, its feature map takes the place of its pixels, in training as in evaluation.
    A picture that cannot be read gives the `PictureError` in place of its pixels.
    """

    def __init__(
        self,
        rows: SharedRows,
        transform: TrainingTransform | EvaluationTransform,
        *,
        captions_per_image: int,
        max_pixels: int,
        seed: int,
        pad_id: int,
        features: FeatureMaps | None = None,
        read_timeout: float | None = None,
    ) -> None:
        self.rows, self.transform, self.features = rows, transform, features
        self.K, self.max_pixels, self.seed, self.pad_id = captions_per_image, max_pixels, seed, pad_id
        self.read_timeout = read_timeout

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Key) -> tuple[Tensor | PictureError, int, list[NDArray[np.int32]]]:
        time, index = key
        captions = self.rows.ids(index)
        try:
            image = self._pixels(time, index) if self.features is None else self.features[index]
        except PictureError as error:
            return error, index, captions
        if isinstance(self.transform, TrainingTransform):
            captions = [
                captions[n] for n in turn(len(captions), self.K, seed=self.seed, time=time, sample=index)
            ]
        return image, index, captions

    def _pixels(self, time: int, index: int) -> Tensor:
        picture = Picture(Path(self.rows["file", index]), self.max_pixels, timeout=self.read_timeout)
        if isinstance(self.transform, TrainingTransform):
            return self.transform(picture, np.random.default_rng((self.seed, time, index)))
        return self.transform(picture)

    def collate(self, items: list[Any]) -> tuple[CaptionBatch | None, list[tuple[str, str, str]]]:
        """A batch of the items that could be read, None where there is none; file, reason, detail of the others."""
        bad = [
            (self.rows["file", index], error.reason, error.detail)
            for error, index, _ in items
            if isinstance(error, PictureError)
        ]
        good = [item for item in items if not isinstance(item[0], PictureError)]
        if not good:
            return None, bad
        images, indices, captions = (list(column) for column in zip(*good, strict=True))
        in_training = isinstance(self.transform, TrainingTransform)
        references = None if in_training else [self.rows["references", index] for index in indices]
        image_ids = [self.rows["image_id", index] for index in indices]
        tokens, lengths = collate_captions(captions, self.pad_id)
        batched = torch.stack(images) if self.features is None else _stacked_as_they_lie(images)
        return CaptionBatch(batched, tokens, lengths, image_ids, references), bad


def _stacked_as_they_lie(maps: list[Tensor]) -> Tensor:
    """(C, h, w) maps, position after position in memory, as a (B, C, h, w) that lies likewise; torch.stack turns it."""
    return torch.stack([each.permute(1, 2, 0) for each in maps]).permute(0, 3, 1, 2)
