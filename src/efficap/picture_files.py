"""Picture files that may come from anywhere, opened: only regular files of known formats, and of a bounded size."""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

# Pillow knows more, one of which (EPS) starts another program, and most of which are little watched.
# Their suffixes tell which files of a folder are pictures; of TGA's four the others mostly mean something else.
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".avifs"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TGA": (".tga",),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
}
FORMATS = tuple(SUFFIXES)
MAX_PIXELS = 178_956_970  # of a picture; Pillow's own limit, but named, and before anything is decoded
_SCAN = b"\xff\xda"
MAX_SCANS = 1000  # of a progressive JPEG, each of which is a pass over all pixels; programs write some ten
_ORIENTATION = 0x0112  # EXIF tag
_BYTES_OF_PIXEL = 8  # of the largest kind, 16 bits of red, green, blue and alpha, not compressed
_BYTES_BESIDE = 1 << 24  # metadata

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `open_picture` holds the limit


def read_picture_file(file: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """A picture's file, whole.

    Raises:
        OSError, ValueError: it is no regular file, such as a pipe that nobody writes to, cannot be read, or has more
            bytes than a picture of so many pixels can have.
    """
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError("no regular file")
        most = _BYTES_OF_PIXEL * max_pixels + _BYTES_BESIDE
        if found.st_size > most:
            raise OSError(f"{found.st_size:,} bytes, more than a picture of {max_pixels:,} pixels has")
        return opened.read()


def open_picture(
    data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
) -> Image.Image:
    """The picture in a file's bytes, of which the header alone has been read.

    Raises:
        PIL.Image.DecompressionBombError: it has more pixels, or more than `MAX_SCANS` scans.
        PIL.UnidentifiedImageError: it is of no such format.
        Exception: of many kinds, by format and damage.
    """
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels // 2 + 1  # Pillow refuses what is above twice its own limit
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError as error:
        raise Image.DecompressionBombError(f"{error}; the limit is {max_pixels:,}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise Image.DecompressionBombError(
            f"{width} x {height} = {width * height:,} pixels, the limit is {max_pixels:,}"
        )
    # What a camera puts behind the picture, such as a film, has the mark by chance once in 64 KiB.
    if image.format in ("JPEG", "MPO") and data.count(_SCAN) > MAX_SCANS + len(data) // 2**15:
        raise Image.DecompressionBombError(
            f"a JPEG of {data.count(_SCAN):,} scans, the limit is {MAX_SCANS:,}"
        )
    return image


def orientation_of(image: Image.Image) -> int:
    """What EXIF says, 1 (upright) to 8, before the picture is decoded: that takes a TIFF's away."""
    if image.format == "TIFF":  # which Pillow turns by itself as it decodes
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata of a good picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def rgb_of(image: Image.Image) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """A picture's pixels as (H, W, 3) uint8, of 16 bits the upper ones."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow's own conversion clips to white
        high = (np.asarray(image, dtype=np.int64).clip(0, 65535) * 255 + 32767) // 65535  # (H, W)
        return np.repeat(high.astype(np.uint8)[..., None], 3, axis=-1)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
