"""Where a model looked as it wrote a word, drawn so that it can be laid over the picture.

h x w positions of the latent map, L layers, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Box = tuple[float, float, float, float]  # left, top, right, bottom

DARKEST = 0.8  # of 1, where the model did not look at all
CELL = 24  # pixels, about, of one head's map beside the others'


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a caption.

    Attributes:
        text: with the space before it.
        probability: that the model gave it after the words before, 0 … 1.
        attention: (h, w), how much the model looked at each position as it wrote it; or (L, H, h, w).
    """

    text: str
    probability: float
    attention: NDArray[np.float32]

    @property
    def mean_attention(self) -> NDArray[np.float32]:
        """(h, w), the mean over layers and heads."""
        return self.attention.reshape(-1, *self.attention.shape[-2:]).mean(axis=0)


def central_square(width: float, height: float, crop: float) -> Box:
    """What the model sees of a picture: the square in its middle, `crop` of its short side."""
    side = crop * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def enlarged(attention: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """An (h, w) map as (height, width), smooth between the middles of its positions, 0 or more."""
    image = Image.fromarray(np.asarray(attention, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), np.float32).clip(min=0)


def shade(attention: NDArray[np.float32], size: tuple[int, int], crop: float) -> Image.Image:
    """What to lay over a picture: clear where the model looked most, black the less it looked elsewhere.

    Args:
        attention: (h, w).
        size: width and height of the picture, pixels.
        crop: share of the picture's short side that the model sees, in the middle.

    Returns:
        An image of that size, mode ``LA``.
    """
    left, top, right, bottom = (round(edge) for edge in central_square(*size, crop))
    seen = enlarged(attention, right - left, bottom - top)
    looked = np.zeros(size[::-1], np.float32)
    looked[top:bottom, left:right] = seen / max(float(seen.max()), 1e-9)
    return _black(looked)


def shade_heads(attention: NDArray[np.float32]) -> Image.Image:
    """The maps of all layers (rows) and heads (columns), each as `shade` would, side by side: mode ``LA``."""
    peaks = attention.max(axis=(-2, -1), keepdims=True)
    maps = attention / np.maximum(peaks, 1e-9)  # (L, H, h, w)
    times = max(1, CELL // maps.shape[-1])
    layers, heads, height, width = maps.shape
    mosaic = maps.transpose(0, 2, 1, 3).reshape(layers * height, heads * width)
    return _black(np.kron(mosaic, np.ones((times, times), np.float32)))


def _black(looked: NDArray[np.float32]) -> Image.Image:
    alpha = np.round(255 * DARKEST * (1 - looked.clip(0, 1))).astype(np.uint8)
    return Image.merge("LA", [Image.new("L", alpha.shape[::-1]), Image.fromarray(alpha)])
