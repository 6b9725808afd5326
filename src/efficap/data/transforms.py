"""From a picture file to the uint8 square that the model takes.

H = W = image_size, in pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from efficap.errors import InputError


def load_rgb(file: Path) -> Image.Image:
    """Open a picture, turn it as its EXIF orientation says, and convert it to RGB (a GIF's first frame).

    Raises:
        OSError: it cannot be read; the message names the file.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # of many kinds, by format and damage
        raise OSError(f"{file}: {error or type(error).__name__}") from error


class EvaluationTransform:
    """The pretrained encoder's own rule: resize the short side, crop the centre.

    Args:
        image_size: pixels of the square.
        interpolation: ``bicubic`` or ``bilinear``.
        crop_pct: share of the resized short side that the crop keeps, 0 … 1.
    """

    def __init__(self, *, image_size: int, interpolation: str, crop_pct: float) -> None:
        self.image_size = image_size
        self.short_side = round(image_size / crop_pct)
        self.interpolation = InterpolationMode(interpolation)

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB picture of any size to (3, H, W) uint8."""
        image = F.resize(image, [self.short_side], interpolation=self.interpolation)
        return F.pil_to_tensor(F.center_crop(image, [self.image_size]))


class TrainingTransform:
    """A random crop, resized (Szegedy et al., 2015); and, where asked for, a random flip.

    Args:
        image_size: pixels of the square.
        interpolation: ``bicubic`` or ``bilinear``.
        crop_scale: smallest and largest share of the picture's area that a crop keeps.
        crop_ratio: narrowest and widest shape of the crop, width / height.
        flip: mirror half of the pictures; wrong where captions say left and right.

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
    ) -> None:
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise InputError(f"data.crop_scale={list(crop_scale)} must rise within 0 … 1; [1, 1] takes all")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise InputError(
                f"data.crop_ratio={list(crop_ratio)} must rise and be positive; [1, 1] is square"
            )
        self.image_size = image_size
        self.resample = Image.Resampling[interpolation.upper()]
        self.crop_scale, self.crop_ratio, self.flip = crop_scale, crop_ratio, flip

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """An RGB picture of any size to (3, H, W) uint8; all chance comes from `rng`."""
        box = self.crop_box(image.width, image.height, rng)
        image = image.resize((self.image_size, self.image_size), self.resample, box=box)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return F.pil_to_tensor(image)

    def crop_box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Left, upper, right, lower of a crop; the largest central square where none of ten draws fits."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.crop_scale)
            ratio = np.exp(rng.uniform(*np.log(self.crop_ratio)))
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side
