"""From an opened picture to the uint8 square that the model takes.

S: image_size, the side of the square in pixels.

Where a picture is cut is decided apart from how it is decoded, so that every data module cuts alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from efficap.data.pictures import Picture, PictureError
from efficap.errors import InputError

MOST_NARROW = 64  # a picture's long side in short ones, where it is resized whole
MOST_ENLARGED = 0.8  # pixels of a scaled crop for each of the square's, along a side


@dataclass(frozen=True, slots=True)
class Crop:
    """Part of a picture, in its own pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool = False


@dataclass(frozen=True, slots=True)
class Resized:
    """The size that a whole picture is brought to, and the corner of the square that is cut from it."""

    width: int
    height: int
    left: int
    top: int


class EvaluationTransform:
    """The pretrained encoder's own rule: resize the short side, crop the centre.

    Args:
        image_size: S.
        interpolation: ``bicubic`` or ``bilinear``.
        crop_pct: share of the resized short side that the crop keeps, 0 … 1.
    """

    def __init__(self, *, image_size: int, interpolation: str, crop_pct: float) -> None:
        self.image_size = image_size
        self.short_side = round(image_size / crop_pct)
        self.interpolation = InterpolationMode(interpolation)

    def cut(self, width: int, height: int) -> Resized:
        """Where the square lies in a picture of this size; torchvision's own rounding.

        Raises:
            PictureError: one side is so much longer than the other that the resized picture could fill the memory,
                however few pixels it has itself.
        """
        short, size = min(width, height), self.short_side
        if max(width, height) > MOST_NARROW * short:
            raise PictureError("too narrow", f"{width} x {height} pixels, the limit is {MOST_NARROW} to 1")
        resized = int(size * width / short), int(size * height / short)
        left, top = (round((side - self.image_size) / 2) for side in resized)
        return Resized(*resized, left, top)

    def __call__(self, picture: Picture) -> Tensor:
        """A picture to (3, S, S) uint8; raises PictureError as `Picture.pixels` and `cut` do."""
        cut = self.cut(picture.width, picture.height)
        return self.square(picture.pixels(), cut)

    def square(self, pixels: Tensor, cut: Resized) -> Tensor:
        """A decoded picture, (3, H, W) uint8, to (3, S, S)."""
        pixels = F.resize(pixels, [cut.height, cut.width], interpolation=self.interpolation, antialias=True)
        return F.crop(pixels, cut.top, cut.left, self.image_size, self.image_size)


class TrainingTransform:
    """A random crop, resized (Szegedy et al., 2015); and, where asked for, a random flip.

    Args:
        image_size: S.
        interpolation: ``bicubic`` or ``bilinear``.
        crop_scale: smallest and largest share of the picture's area that a crop keeps.
        crop_ratio: narrowest and widest shape of the crop, width / height.
        flip: mirror half of the pictures; wrong where captions say left and right.
        scaled_decoding: decode a JPEG at a half, a quarter or an eighth where that leaves its short side at least S
            pixels; faster, and a little less sharp.

    Raises:
        InputError: shares outside 0 … 1, or shapes that are not positive.
    """

    def __init__(
        self,
        *,
        image_size: int,
        interpolation: str,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: bool,
        scaled_decoding: bool,
    ) -> None:
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(
                f"data.crop_scale={list(crop_scale)} must rise within 0 … 1; [1, 1]: as much as data.crop_ratio allows"
            )
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise InputError(
                f"data.crop_ratio={list(crop_ratio)} must rise and be positive; [1, 1] is square"
            )
        self.image_size = image_size
        self.interpolation = InterpolationMode(interpolation)
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip
        self.scaled_decoding = scaled_decoding

    def __call__(self, picture: Picture, rng: np.random.Generator) -> Tensor:
        """A picture of any size to (3, S, S) uint8; all chance comes from `rng`."""
        crop = self.cut(picture.width, picture.height, rng)
        pixels = picture.pixels(self._at_least(picture, crop) if self.scaled_decoding else None)  # (3, H, W)
        down, across = pixels.shape[1] / picture.height, pixels.shape[2] / picture.width  # 1 where not scaled
        top, left = round(crop.top * down), round(crop.left * across)
        height = max(1, round((crop.top + crop.height) * down) - top)
        width = max(1, round((crop.left + crop.width) * across) - left)
        return self.square(F.crop(pixels, top, left, height, width), crop)

    def square(self, pixels: Tensor, crop: Crop) -> Tensor:
        """The part of a picture that was cut out, (3, h, w) uint8, to (3, S, S)."""
        size = [self.image_size, self.image_size]
        pixels = F.resize(pixels, size, interpolation=self.interpolation, antialias=True)
        return pixels.flip(2) if crop.flip else pixels

    def _at_least(self, picture: Picture, crop: Crop) -> int:
        """The short side that a scaled picture must keep: S, and so much that the crop is hardly enlarged."""
        short = min(picture.width, picture.height)
        return max(
            self.image_size, int(MOST_ENLARGED * self.image_size * short / min(crop.width, crop.height))
        )

    def cut(self, width: int, height: int, rng: np.random.Generator) -> Crop:
        """A random crop of a picture of this size; the largest central square where none of ten draws fits."""
        crop = self._box(width, height, rng)
        return Crop(*crop, flip=self.flip and bool(rng.random() < 0.5))

    def _box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = np.exp(rng.uniform(*np.log(self.crop_ratio)))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
        side = min(width, height)
        return (width - side) // 2, (height - side) // 2, side, side
