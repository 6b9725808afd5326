"""Pictures and webdataset tars that the tests write themselves."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from efficap.data.order import BatchOrder, EvaluationOrder
from efficap.data.shards.batches import ShardBatches
from efficap.data.shards.examine import examine
from efficap.data.shards.index import write_index
from efficap.data.shards.reader import ShardReader
from efficap.data.text import CaptionText
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.picture_files import MAX_PIXELS
from efficap.tokenizer import CaptionTokenizer


class ThisProcess:
    """Stands in for a pool of processes, which take seconds to start."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> ThisProcess:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def shutdown(self, **_: Any) -> None: ...

    def map(self, function: Callable[..., Any], jobs: Iterable[Any]) -> Iterable[Any]:
        return map(function, jobs)


Member = tuple[str, bytes]
PLAIN_TEXT: dict[str, Any] = {
    "lowercase": False,
    "final_stop": "keep",
    "min_words": None,
    "max_words": None,
    "exclude": None,
}


def scenery(width: int, height: int, seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, 3): gradients, textures, a little noise and hard edges, as photographs have them; no symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    pixels = np.stack(
        [220 * x + 20, 200 * y + 30 * np.sin(40 * x + seed), 120 + 90 * np.cos(9 * x - 13 * y)], -1
    )
    pixels += 8 * np.sin(150 * (x + 2 * y))[..., None] + rng.normal(0, 5, (height, width, 3))
    pixels[height // 5 : height // 2, width // 8 : width // 4] = (250, 240, 10)
    pixels[2 * height // 3 :, width // 2 : 3 * width // 4] = rng.integers(0, 255, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def jpeg(seed: int = 0, width: int = 80, height: int = 72) -> bytes:
    return encoded(Image.fromarray(scenery(width, height, seed)), quality=85)


def png16(values: NDArray[np.uint16]) -> bytes:
    """A PNG of (H, W, 3) 16-bit values, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tar_bytes(members: Iterable[Member], format: int = tarfile.USTAR_FORMAT) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


def write_tar(tar: Path, members: Iterable[Member], format: int = tarfile.USTAR_FORMAT) -> Path:
    tar.parent.mkdir(parents=True, exist_ok=True)
    tar.write_bytes(tar_bytes(members, format))
    return tar


def sample(key: str, caption: str, image: bytes | None = None, **fields: Any) -> list[Member]:
    """The members of a sample as img2dataset writes them."""
    fields = {"key": key, "caption": caption, **fields}
    return [
        (
            f"{key}.jpg",
            image if image is not None else jpeg(zlib.crc32(key.encode(errors="surrogateescape"))),
        ),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def samples(*keys: str) -> list[Member]:
    return [member for key in keys for member in sample(key, f"the picture {key}")]


def indexed(
    tars: Path | list[Path],
    *,
    max_pixels: int = MAX_PIXELS,
    caption_field: str | None = None,
    index_dir: Path | None = None,
    **text: Any,
) -> ShardReader:
    """A reader of tars, examined and indexed here and now, in this process."""
    tars = [tars] if isinstance(tars, Path) else tars
    headers = []
    for tar in tars:
        examined = examine(tar, max_pixels=max_pixels)
        write_index(examined, tar, index_dir)
        headers.append(examined.header)
    cleaner = CaptionText(**{**PLAIN_TEXT, **text})
    return ShardReader(tars, headers, index_dir=index_dir, caption_field=caption_field, text=cleaner)


def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.learn(["the picture of a thing"], 300)


def shard_batches(
    reader: ShardReader,
    order: BatchOrder | EvaluationOrder,
    transform: TrainingTransform | EvaluationTransform,
    **changes: Any,
) -> ShardBatches:
    settings: dict[str, Any] = {
        "captions_per_image": 1,
        "max_tokens": 40,
        "on_cut": _forget,
        "max_pixels": MAX_PIXELS,
        "seed": 0,
        "batch_size": 64,
        "num_readers": 1,
        "num_threads": 2,
        "device": torch.device("cpu"),
    }
    return ShardBatches(reader, order, transform, tokenizer(), **{**settings, **changes})


_forget: Callable[[int], None] = lambda _: None  # noqa: E731
