"""Writes a caption table as webdataset tars, in img2dataset's layout."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from efficap.data.pictures import Picture, PictureError
from efficap.data.pool import fewer_workers, in_processes
from efficap.data.table import CaptionTable
from efficap.errors import InputError
from efficap.files import replacing, unfinished

RECORD = "shards.json"
JPEG_QUALITY = 92
_LONGEST = 65_500  # pixels of a side that libjpeg writes
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """What decides the bytes of the shards.

    Attributes:
        samples_per_shard: pictures in a tar; the last has fewer.
        short_side: pixels that larger pictures are brought to, as JPEGs; None copies every file as it is.
        max_pixels: larger pictures are left out.
    """

    samples_per_shard: int
    short_side: int | None
    max_pixels: int


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One tar to write, and the pictures of a table that go into it."""

    tar: Path
    image_ids: list[str]
    files: list[Path]
    references: list[list[str]]
    settings: ShardSettings


def write_shards(table: CaptionTable, out_dir: Path, settings: ShardSettings, workers: int) -> Counter[str]:
    """Write a split as tars; those that are already there, written with the same settings, are kept.

    Each tar holds ``<key>.jpg`` (or what the file is), ``<key>.txt`` (the first caption) and ``<key>.json``
    (``caption``, ``captions``, ``image_id`` and the size), and comes with ``<tar>_stats.json``. It appears when it is
    complete.

    Args:
        table: the split.
        out_dir: its folder; it is made.
        workers: processes.

    Returns:
        Pictures by what became of them: ``success``, or why they are left out.

    Raises:
        InputError: the folder holds other shards.
    """
    _check_record(table, out_dir, settings)
    jobs = _jobs(table, out_dir, settings)
    outcome: Counter[str] = Counter()
    missing = []
    for job in jobs:
        done = _read_stats(job.tar)
        if done is None:
            missing.append(job)
        else:
            outcome.update(done)
    console = Console(stderr=True)
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    way_out = f"{fewer_workers(workers)}, and the same command again goes on with the shards that are left"
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"Writing {table.split}", total=len(table), completed=outcome.total())
        for counts in in_processes(_write_shard, missing, workers=workers, way_out=way_out):
            outcome.update(counts)
            progress.advance(bar, sum(counts.values()))
    return outcome


def _check_record(table: CaptionTable, out_dir: Path, settings: ShardSettings) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    record = {
        **asdict(settings),
        "pictures": len(table),
        "split": table.split,
        "captions": _digest(table),
        "folder": os.path.realpath(str(table.files[0]).removesuffix(table.image_ids[0])),
    }
    file = out_dir / RECORD
    if file.is_file():
        try:
            found = {"folder": record["folder"], **json.loads(file.read_text(encoding="utf-8"))}
        except ValueError as error:
            raise InputError(
                f"{file} is damaged ({error}); remove it with its folder, and start anew"
            ) from error
        if found != record:
            raise InputError(
                f"{out_dir} holds shards written with {json.dumps(found)}, and {json.dumps(record)} is asked for; "
                "name another folder, or delete this one"
            )
    elif any(out_dir.glob("*.tar")):
        raise InputError(f"{out_dir} holds tars of another origin; name a folder that is new or empty")
    else:
        with replacing(file) as record_file:
            record_file.write(f"{json.dumps(record)}\n".encode())


def _digest(table: CaptionTable) -> str:
    """Tells tables apart whose shards must not be mixed, such as the same one with its captions corrected."""
    digest = hashlib.blake2b(digest_size=16)
    for row in zip(table.image_ids, table.references, strict=True):
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def _jobs(table: CaptionTable, out_dir: Path, settings: ShardSettings) -> list[ShardJob]:
    size = settings.samples_per_shard
    starts = range(0, len(table), size)
    digits = max(5, len(str(len(starts))))
    jobs = []
    for number, start in enumerate(starts):
        rows = table.rows.slice(start, size)
        part = CaptionTable(table.split, rows)
        tar = out_dir / f"{number:0{digits}d}.tar"
        jobs.append(ShardJob(tar, part.image_ids, part.files, part.references, settings))
    return jobs


def _stats_file(tar: Path) -> Path:
    return tar.with_name(f"{tar.stem}_stats.json")


def _read_stats(tar: Path) -> dict[str, int] | None:
    """What became of a tar's pictures, if it was written to its end."""
    try:
        stats = json.loads(_stats_file(tar).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(stats["status_dict"]) if tar.is_file() else None


def _write_shard(job: ShardJob) -> dict[str, int]:
    outcome: Counter[str] = Counter()
    with (
        unfinished(job.tar) as temporary,
        tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for row, (image_id, file, references) in enumerate(
            zip(job.image_ids, job.files, job.references, strict=True)
        ):
            try:
                data, suffix, size = _encoded(file, job.settings)
            except PictureError as error:
                outcome[error.reason] += 1
                continue
            key = f"{job.tar.stem}{row:0{len(str(job.settings.samples_per_shard))}d}"
            fields = {
                "key": key,
                "image_id": image_id,
                "caption": references[0],
                "captions": references,
                "width": size[0],
                "height": size[1],
                "status": "success",
            }
            _add(archive, f"{key}.{suffix}", data)
            _add(archive, f"{key}.txt", references[0].encode())
            _add(archive, f"{key}.json", json.dumps(fields, ensure_ascii=False).encode())
            outcome["success"] += 1
    stats = {
        "count": len(job.image_ids),
        "successes": outcome["success"],
        "failed_to_download": outcome["missing"],
        "failed_to_resize": outcome.total() - outcome["success"] - outcome["missing"],
        "status_dict": dict(outcome),
    }
    _stats_file(job.tar).write_text(json.dumps(stats, indent=4) + "\n", encoding="utf-8")
    return dict(outcome)


def _encoded(file: Path, settings: ShardSettings) -> tuple[bytes, str, tuple[int, int]]:
    """The bytes of a picture, the suffix that fits them, and its width and height as shown.

    Raises:
        PictureError: it cannot be read, or is so narrow that no JPEG can hold it with its short side.
    """
    picture = Picture(file, settings.max_pixels)
    short, side = min(picture.width, picture.height), settings.short_side
    if side is None or (short <= side and picture.format in SUFFIXES):
        picture.pixels(at_least=1)  # a broken one is not passed on
        return file.read_bytes(), SUFFIXES.get(picture.format, "jpg"), (picture.width, picture.height)
    pixels = picture.pixels(at_least=2 * side)  # (3, H, W); twice as large as needed loses nothing
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    scale = min(1.0, side / short)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    if max(size) > _LONGEST:
        raise PictureError("too narrow", f"{size[0]} x {size[1]} pixels; a JPEG's sides end at {_LONGEST:,}")
    data = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(data, "JPEG", quality=JPEG_QUALITY)
    return data.getvalue(), "jpg", size


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
