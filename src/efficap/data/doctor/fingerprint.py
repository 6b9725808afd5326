"""A picture in a few numbers: enough to know it again after it was resized or re-encoded.

H, W: height and width in pixels of a reduced copy.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from efficap.data.doctor.padding import bars
from efficap.data.pictures import Picture

SIDE = 64  # pixels, the shortest side of a reduced copy; a JPEG is decoded at 1/8 to 1/1 of its size
HASH_SIDE = 32
COLOUR_SIDE = 6
FLAT = 2.0  # grey levels, standard deviation: below it the hash is noise

LOOK = np.dtype(
    [
        ("width", "<u4"),  # as shown, in pixels
        ("height", "<u4"),
        ("digest", "<u8"),  # of the reduced copy: equal for equal pictures
        ("hash", "<u8"),  # near for near pictures
        ("flat", "?"),  # without contrast: the hash says nothing
        ("colours", "u1", (COLOUR_SIDE, COLOUR_SIDE, 3)),
        ("bars", "u1", 2),  # per cent of the height, and of the width, that bars take
    ]
)
Looks = NDArray[Any]  # of LOOK

_POSITIONS = np.arange(HASH_SIDE)
_DCT = np.cos(np.pi * (2 * _POSITIONS + 1) * _POSITIONS[:8, None] / (2 * HASH_SIDE))  # (8, 32), DCT-II
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)


def look_at(picture: Picture) -> tuple[object, ...]:
    """One row of `LOOK`.

    Raises:
        PictureError: the picture cannot be decoded.
    """
    pixels = np.ascontiguousarray(picture.pixels(at_least=SIDE).permute(1, 2, 0).numpy())  # (H, W, 3)
    digest = hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=8).digest()
    image = Image.fromarray(pixels)
    small = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BILINEAR)
    grey = np.asarray(small, dtype=np.float64)
    colours = np.asarray(image.resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX))
    return (
        picture.width,
        picture.height,
        int.from_bytes(digest, "little"),
        perceptual_hash(grey),
        bool(grey.std() < FLAT),
        colours,
        bars(pixels),
    )


def perceptual_hash(grey: NDArray[np.float64]) -> np.uint64:
    """The pHash of (32, 32) grey levels: the signs of its 63 lowest frequencies about their median.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1, in the form of
    https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html, with the median for the mean. The mean
    grey (the first coefficient) is left out: its bit is always 0.
    """
    frequencies = (_DCT @ grey @ _DCT.T).ravel()  # (64,)
    above = frequencies > np.median(frequencies[1:])
    above[0] = False
    return np.uint64(_BITS[above].sum())
