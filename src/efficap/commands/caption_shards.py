"""Caption webdataset shards: a file of results for each, written when it is complete, so that nothing is done twice.

A process claims a shard by a lock that ends with it. Any number of processes may therefore work on the same shards with
the same command, and a killed one leaves its shard to the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efficap.commands.caption_output import CaptioningBar, as_row, check_record, escaped, keep_record
from efficap.data.pictures import Picture
from efficap.data.shards.names import find_shards
from efficap.data.shards.tar import Broken, SampleError, TarSample, read_contents
from efficap.data.transforms import EvaluationTransform
from efficap.errors import InputError
from efficap.training.writer import CaptionWriter


def names_shards(images: str) -> bool:
    """Whether `images` means tars: a name, brace list or glob that ends in .tar, or a folder that holds some."""
    path = Path(images).expanduser()
    return images.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar")))


def caption_shards(
    writer: CaptionWriter,
    transform: EvaluationTransform,
    shards: str,
    out: Path | None,
    run: Path,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    record: dict[str, Any],
) -> None:
    """Write ``<shard>.parquet`` and ``<shard>.jsonl`` for every shard that has none yet.

    Args:
        writer: writes the captions.
        transform: the encoder's own.
        shards: what `find_shards` knows.
        out: the folder of the results; None: ``RUN/captions/<folder of the shards>``.
        run: the run directory.
        batch_size: pictures at a time.
        num_workers: loader processes.
        device: where the model lies.
        record: what the captions are made with, kept beside the results.

    Raises:
        InputError: no such shards, two of one name, or a folder with results of another run, decoding or precision.
    """
    tars = find_shards(shards, "images")
    if len({tar.stem for tar in tars}) < len(tars):
        raise InputError(f"images={shards}: two shards have the same name; caption their folders one by one")
    folder = out or run / "captions" / tars[0].parent.name
    check_record(folder, record)
    keep_record(folder, record)
    total = sum(tar.stat().st_size for tar in tars)  # bytes: known without reading the tars
    with CaptioningBar(f"Captioning {len(tars):,} shards", total) as bar:
        for tar in tars:
            with _claimed(folder, tar) as mine:
                if mine:
                    rows, size = [], tar.stat().st_size
                    for row, share in _captioned(tar, writer, transform, batch_size, num_workers, device):
                        rows.append(row)
                        bar.count_picture(share * size)
                    _write(folder, tar, rows)
                else:
                    bar.leave_out(tar.stat().st_size)
    done = sum(_results(folder, tar).is_file() for tar in tars)
    Console(stderr=True).print(
        f"{bar.pictures:,} pictures captioned; {done:,} of {len(tars):,} shards are done, in {folder}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


@contextlib.contextmanager
def _claimed(folder: Path, tar: Path) -> Iterator[bool]:
    """Whether this process may caption a shard: it is not done, and no other process is at it."""
    lock = folder / f".{tar.stem}.lock"
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not _results(folder, tar).is_file()
    if _results(folder, tar).is_file():
        lock.unlink(missing_ok=True)


def _results(folder: Path, tar: Path) -> Path:
    return folder / f"{tar.stem}.parquet"


def _captioned(
    tar: Path,
    writer: CaptionWriter,
    transform: EvaluationTransform,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[tuple[dict[str, Any], float]]:
    """A row for each sample, and its share of the tar."""
    contents = read_contents(tar)
    loader: DataLoader[Any] = DataLoader(
        TarPictures(tar, contents.samples, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    share = 1 / max(1, len(contents.samples))
    for loaded in loader:
        for name, captions, error in writer.write_loaded(loaded, device):
            key = escaped(name.removeprefix(f"{tar.stem}/"))  # a member's name need not be UTF-8
            yield as_row("key", key, captions, error), share
    if contents.problem is not None:
        yield as_row("key", "", [], contents.problem), 0.0


class TarPictures(Dataset[tuple[str, Tensor | None, str]]):
    """Each sample of a tar as (tar/key, (3, S, S) uint8, ""), or (tar/key, None, reason)."""

    def __init__(self, tar: Path, samples: list[TarSample], transform: EvaluationTransform) -> None:
        self.tar, self.samples, self.transform = tar, samples, transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        sample = self.samples[index]
        name = f"{self.tar.stem}/{sample.key}"
        try:
            if sample.error is not None:
                raise sample.error
            if sample.image is None:
                raise SampleError("no picture")
            with self.tar.open("rb") as file:
                file.seek(sample.image.offset)
                data = file.read(sample.image.size)
            return name, self.transform(Picture(data)), ""
        except Broken as error:
            return name, None, str(error)


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("error", pa.string()),
        (
            "captions",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("score", pa.float32()),
                        ("ended", pa.bool_()),
                        ("tokens", pa.list_(pa.int32())),
                        ("token_log_probs", pa.list_(pa.float32())),
                    ]
                )
            ),
        ),
    ]
)


def _write(folder: Path, tar: Path, rows: list[dict[str, Any]]) -> None:
    """The lines first, the Parquet last: that it is there means that the shard is done."""
    temporary = folder / f".{tar.stem}.{os.getpid()}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    temporary.write_text(lines, encoding="utf-8")
    os.replace(temporary, folder / f"{tar.stem}.jsonl")
    pq.write_table(pa.Table.from_pylist(rows, _SCHEMA), temporary)
    os.replace(temporary, _results(folder, tar))
