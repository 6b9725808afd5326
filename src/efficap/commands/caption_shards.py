"""Caption webdataset shards: a file of results for each, written when it is complete, so that nothing is done twice.

A process claims a shard by a lock that ends with it. Any number of processes may therefore work on the same shards with
the same command, and a killed one leaves its shard to the next.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efficap.commands.caption_folder import pictures_below
from efficap.commands.caption_output import CaptioningBar, as_row, check_folder, escaped, keep_record
from efficap.commands.shard_results import Origin, is_done, write_results
from efficap.data.pictures import Picture
from efficap.data.shards.names import find_shards
from efficap.data.shards.tar import Broken, SampleError, TarSample, read_contents
from efficap.data.transforms import EvaluationTransform
from efficap.errors import InputError
from efficap.ranks import work_apart
from efficap.training.writer import CaptionWriter


def names_shards(images: str) -> bool:
    """Whether `images` means tars: a name, brace list or glob that ends in .tar, or a folder that holds some."""
    path = Path(images).expanduser()
    return images.endswith(".tar") or (path.is_dir() and any(path.glob("*.tar")))


def check_shards_alone(images: str) -> None:
    """Refuse a folder of which not all would be captioned.

    Raises:
        InputError: `images` is a folder that holds pictures beside its shards.
    """
    folder = Path(images).expanduser()
    picture = next(pictures_below(folder), None)
    if picture is not None:
        raise InputError(
            f"images={images} holds shards and pictures, such as {picture}; name either alone: "
            f"images='{folder}/*.tar' for the shards, images='{picture.parent}/*{picture.suffix}' for such pictures"
        )


def caption_shards(
    load: Callable[[], tuple[CaptionWriter, int]],
    transform: EvaluationTransform,
    shards: str,
    out: Path | None,
    run: Path,
    *,
    num_workers: int,
    device: torch.device,
    record: dict[str, Any],
) -> None:
    """Write ``<shard>.parquet`` and ``<shard>.jsonl`` for every shard that has none yet, or has changed since.

    Args:
        load: gives what writes the captions, and how many pictures it takes at a time.
        transform: the encoder's own.
        shards: what `find_shards` knows.
        out: the folder of the results; None: ``RUN/captions/<folder of the shards>``.
        run: the run directory.
        num_workers: loader processes.
        device: where the model lies.
        record: what the captions are made with, kept beside the results.

    Raises:
        InputError: no such shards, two of one name, or a folder with results of another run, decoding or precision, or
            of other shards.
    """
    tars = find_shards(shards, "images")
    if len({tar.stem for tar in tars}) < len(tars):
        raise InputError(f"images={shards}: two shards have the same name; caption their folders one by one")
    folder = out or run / "captions" / tars[0].parent.name
    check_folder(folder, record)
    states = [is_done(folder, tar) for tar in tars]  # all that can be refused, before anything is loaded
    if changed := states.count(False):
        _say(f"{changed:,} of {len(tars):,} shards have changed since; these are captioned once more")
    work_apart()
    writer, batch_size = load()  # may refuse the decoding, which then is nobody's record
    keep_record(folder, record)
    captioned = functools.partial(
        _captioned,
        writer=writer,
        transform=transform,
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
    )
    total = sum(tar.stat().st_size for tar in tars)  # bytes: known without reading the tars
    failed = 0
    with CaptioningBar(f"Captioning {len(tars):,} shards", total) as bar:
        for tar in tars:
            with _claimed(folder, tar) as mine:
                if mine:
                    failed += _caption_shard(folder, tar, captioned, bar)
                else:
                    bar.leave_out(tar.stat().st_size)
    done = sum(is_done(folder, tar) is True for tar in tars)
    left_out = f", {failed:,} left out (the column error says why)" if failed else ""
    _say(
        f"{bar.pictures - failed:,} pictures captioned{left_out}; "
        f"{done:,} of {len(tars):,} shards are done, in {folder}"
    )


def _caption_shard(
    folder: Path,
    tar: Path,
    captioned: Callable[[Path, list[TarSample]], Iterator[dict[str, Any]]],
    bar: CaptioningBar,
) -> int:
    """Write the results of a shard; returns how many of its samples have no caption."""
    origin = Origin.of(tar)  # first: should the tar change while it is read, it is captioned again
    contents = read_contents(tar)
    rows = []
    for row in captioned(tar, contents.samples):
        rows.append(row)
        bar.count_picture(origin.size / len(contents.samples))
    failed = sum(bool(row["error"]) for row in rows)
    if contents.problem is not None:
        rows.append(as_row("key", "", [], contents.problem))
        _say(f"{tar}: {contents.problem}; once it changes it is captioned again", bar.console)
    write_results(folder, tar, origin, rows)
    return failed


def _say(text: str, console: Console | None = None) -> None:
    (console or Console(stderr=True)).print(text, soft_wrap=True, highlight=False, markup=False)


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
        except OSError:  # a file system without locks, where one process at a time has the folder
            pass
        yield not is_done(folder, tar)
    if is_done(folder, tar):
        lock.unlink(missing_ok=True)


def _captioned(
    tar: Path,
    samples: list[TarSample],
    *,
    writer: CaptionWriter,
    transform: EvaluationTransform,
    batch_size: int,
    num_workers: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """A row for each sample."""
    loader: DataLoader[Any] = DataLoader(
        TarPictures(tar, samples, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
    )
    for loaded in loader:
        for name, captions, error in writer.write_loaded(loaded, device):
            key = escaped(name.removeprefix(f"{tar.stem}/"))  # a member's name need not be UTF-8
            yield as_row("key", key, captions, error)


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
