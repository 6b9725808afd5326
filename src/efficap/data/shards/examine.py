"""A shard gone through sample by sample: which are good, where they lie, and what is wrong with the others."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from efficap.data.pictures import Picture
from efficap.data.shards.tar import (
    BLOCK,
    Broken,
    Extent,
    SampleError,
    TarSample,
    fingerprint,
    is_unicode,
    read_contents,
)
from efficap.data.text import cleaned

VERSION = 2

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_id", pa.string()),
        *(
            (f"{member}_{part}", pa.int64())
            for member in ("image", "text", "json")
            for part in ("offset", "size", "header")  # the header block's fingerprint
        ),
        ("width", pa.int32()),  # as shown
        ("height", pa.int32()),
        ("dali", pa.int8()),  # 1 where DALI decodes it; Pillow does the rest
    ]
)


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that is left out."""

    tar: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.tar}: {self.key} ({self.reason}{': ' if self.detail else ''}{self.detail})"


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """What is known of a shard without reading its index.

    Attributes:
        size, mtime_ns, digest: of the tar; the digest is BLAKE2b's over all of it.
        max_pixels: larger pictures were left out.
        good: samples in the index.
        bad: number of samples left out, by reason.
        first_bad: one of them, to be named.
        problem: what is wrong with the tar itself, such as ``cut tar``.
    """

    version: int
    size: int
    mtime_ns: int
    digest: str
    max_pixels: int
    good: int
    bad: dict[str, int] = field(default_factory=dict)
    first_bad: tuple[str, str, str] | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Examined:
    """A tar gone through sample by sample."""

    header: IndexHeader
    samples: pa.Table
    bad: list[BadSample]


OnSample = Callable[[str, bytes, list[str]], None]


def examine(tar: Path, *, max_pixels: int, on_sample: OnSample | None = None) -> Examined:
    """Decode every picture of a tar and read every caption.

    Args:
        max_pixels: larger pictures are left out.
        on_sample: called for each good sample with its image id, the picture's bytes and its captions.

    Raises:
        OSError: the tar cannot be read.
    """
    stat = tar.stat()
    contents = read_contents(tar)
    rows: list[dict[str, object]] = []
    bad: list[BadSample] = []
    with tar.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        for sample in contents.samples:
            try:
                rows.append(_examine(file, tar, sample, max_pixels, on_sample))
            except Broken as error:
                bad.append(BadSample(str(tar), sample.key, error.reason, error.detail))
    header = IndexHeader(
        VERSION,
        stat.st_size,
        stat.st_mtime_ns,
        digest,
        max_pixels,
        len(rows),
        dict(Counter(sample.reason for sample in bad)),
        (bad[0].key, bad[0].reason, bad[0].detail) if bad else None,
        contents.problem,
    )
    return Examined(header, pa.Table.from_pylist(rows, SCHEMA), bad)


def _examine(
    file: BinaryIO, tar: Path, sample: TarSample, max_pixels: int, on_sample: OnSample | None
) -> dict[str, object]:
    if sample.error is not None:
        raise sample.error
    if sample.image is None:
        raise SampleError("no picture", "text alone")
    data = _read(file, sample.image)
    picture = Picture(data, max_pixels)
    picture.pixels(at_least=1)  # all of it is read, at an eighth of its size
    image_id, captions = _read_texts(file, tar, sample)
    if on_sample is not None:
        on_sample(image_id, data, captions)
    row: dict[str, object] = {"key": sample.key, "image_id": image_id}
    for name, extent in (("image", sample.image), ("text", sample.text), ("json", sample.json)):
        row |= {
            f"{name}_offset": extent.offset if extent else -1,
            f"{name}_size": extent.size if extent else 0,
            f"{name}_header": fingerprint(_read(file, Extent(extent.offset - BLOCK, BLOCK))) if extent else 0,
        }
    # DALI 2.4 fails on WebP with metadata and on all GIFs; JPEG and PNG are what there is much of.
    dali = int(picture.format in ("JPEG", "PNG") and picture.plain)
    return {**row, "width": picture.width, "height": picture.height, "dali": dali}


def _read_texts(file: BinaryIO, tar: Path, sample: TarSample) -> tuple[str, list[str]]:
    """The image id (the json's ``image_id``, or tar and key) and all captions of a sample."""
    captions: list[str] = []
    image_id = f"{tar.stem}/{sample.key}"
    if sample.text is None and sample.json is None:
        raise SampleError("no caption", "neither .txt nor .json")
    if sample.text is not None:
        captions.append(decode_text(_read(file, sample.text)))
    if sample.json is not None:
        fields = decode_json(_read(file, sample.json))
        image_id = str(fields.get("image_id") or image_id)
        if not is_unicode(image_id):
            raise SampleError("unsafe name", ascii(image_id))
        for name in ("captions", "caption"):
            captions += captions_of(fields, name) if fields.get(name) else []
    captions = [caption for caption in captions if cleaned(caption)]
    if not captions:
        raise SampleError("empty caption")
    return image_id, list(dict.fromkeys(captions))


def decode_text(data: bytes) -> str:
    """Raises SampleError where it is no UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError("no UTF-8", str(error)) from error


def decode_json(data: bytes) -> dict[str, object]:
    """Raises SampleError where it is no JSON object."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("broken json", str(error)) from error
    if not isinstance(fields, dict):
        raise SampleError("broken json", f"a {type(fields).__name__}, no object")
    return fields


def captions_of(fields: dict[str, object], name: str) -> list[str]:
    """The captions in a field that holds one or a list; raises SampleError where there is none."""
    value = fields.get(name)
    captions = value if isinstance(value, list) else [value]
    texts = [caption for caption in captions if isinstance(caption, str)]
    if not texts:
        raise SampleError("no caption", f"no text in the json's field {name!r}")
    return texts


def _read(file: BinaryIO, extent: Extent) -> bytes:
    file.seek(extent.offset)
    return file.read(extent.size)
