"""From a picture file to the uint8 square that the model takes.

H = W = image_size, in pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F


def load_rgb(file: Path) -> Image.Image:
    """Open a picture, turn it as its EXIF orientation says, and convert it to RGB (a GIF's first frame).

    Raises:
        OSError: it cannot be read; the message names the file.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{file}: {error}") from error


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
    """A random crop, resized; and, where asked for, a random flip.

    Args:
        image_size: pixels of the square.
        interpolation: ``bicubic`` or ``bilinear``.
        crop_scale: smallest and largest share of the picture's area that a crop keeps.
        crop_ratio: narrowest and widest shape of the crop, width / height.
        flip: mirror half of the pictures; wrong where captions say left and right.
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
        self.crop = v2.RandomResizedCrop(
            image_size, scale=crop_scale, ratio=crop_ratio, interpolation=InterpolationMode(interpolation)
        )
        self.flip = flip

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """An RGB picture of any size to (3, H, W) uint8; the same seed gives the same pixels."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            image = self.crop(image)
            if self.flip and torch.rand(()) < 0.5:
                image = F.horizontal_flip(image)
        return F.pil_to_tensor(image)
