"""Where a model looked as it wrote a word, drawn so that it can be laid over the picture.

h x w positions of the latent map, L layers, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DARKEST = 0.8  # of 1, where the model did not look at all
CELL = 40  # pixels, a side of one head's map beside the others'


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a caption.

    Attributes:
        text: with the space before it.
        probability: that the model gave it after the words before, 0 … 1.
        attention: (h, w), how much the model looked at each position as it wrote it; or (L, H, h, w); None
            where that was not asked for.
    """

    text: str
    probability: float
    attention: NDArray[np.float32] | None

    @property
    def mean_attention(self) -> NDArray[np.float32]:
        """(h, w), the mean over layers and heads."""
        assert self.attention is not None
        return self.attention.reshape(-1, *self.attention.shape[-2:]).mean(axis=0)


def central_square(width: int, height: int, crop: float) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what the model sees of a picture: `crop` of its short side, in the middle."""
    side = max(1, round(crop * min(width, height)))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _enlarged(attention: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """An (h, w) map as (height, width), smooth between the middles of its positions."""
    image = Image.fromarray(np.asarray(attention, np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), np.float32)


def shade(attention: NDArray[np.float32], size: tuple[int, int], crop: float) -> Image.Image:
    """What to lay over a picture: clear where the model looked most, black the less it looked elsewhere.

    Args:
        attention: (h, w).
        size: width and height of the picture, pixels.
        crop: share of the picture's short side that the model sees, in the middle.

    Returns:
        An image of that size, mode ``LA``.
    """
    left, top, right, bottom = central_square(*size, crop)
    seen = _enlarged(attention, right - left, bottom - top)
    looked = np.zeros(size[::-1], np.float32)
    looked[top:bottom, left:right] = seen / max(float(seen.max()), 1e-9)
    alpha = np.round(255 * DARKEST * (1 - looked)).astype(np.uint8)
    return Image.merge("LA", [Image.new("L", size), Image.fromarray(alpha)])


def shade_heads(attention: NDArray[np.float32], seen: Image.Image) -> Image.Image:
    """The part of a picture that the model sees, under the maps of all layers (rows) and heads (columns)."""
    small = seen.resize((CELL, CELL), Image.Resampling.LANCZOS)
    layers, heads = attention.shape[:2]
    mosaic = Image.new("RGB", (heads * (CELL + 1) - 1, layers * (CELL + 1) - 1), "white")
    for layer, head in np.ndindex(layers, heads):
        corner = head * (CELL + 1), layer * (CELL + 1)
        mosaic.paste(small, corner)
        over = shade(attention[layer, head], small.size, 1.0)
        mosaic.paste(over.getchannel("L"), corner, over.getchannel("A"))
    return mosaic
