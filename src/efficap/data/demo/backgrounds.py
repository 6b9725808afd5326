"""The backgrounds of the scenes, each a little different every time it is drawn."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
Pixels = NDArray[np.float32]


def draw_background(name: str, size: int, rng: Random) -> Image.Image:
    """A background of `size` pixels square, RGB; `name` is a key of `scenes.BACKGROUNDS`."""
    return _PAINTERS[name](size, rng)


def jitter(colour: RGB, rng: Random, amount: int) -> RGB:
    """A shade near `colour`: each channel up to `amount` (of 255) away."""
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def _white(size: int, rng: Random) -> Image.Image:
    top = jitter((250, 250, 249), rng, 3)
    return _to_image(_gradient(size, top, jitter((228, 229, 232), rng, 5)))


def _night(size: int, rng: Random) -> Image.Image:
    sky = _to_image(_gradient(size, jitter((8, 10, 28), rng, 4), jitter((34, 36, 78), rng, 6)))
    pen = ImageDraw.Draw(sky)
    for _ in range(rng.randint(24, 40)):
        x, y, light = rng.uniform(0, size), rng.uniform(0, size), rng.randint(110, 235)
        dot = size * rng.choice((0.0, 0.0, 0.008))
        pen.ellipse((x, y, x + dot, y + dot), fill=(light, light, light - 20))
    return sky


def _sky(size: int, rng: Random) -> Image.Image:
    sky = _to_image(_gradient(size, jitter((84, 158, 226), rng, 10), jitter((190, 224, 246), rng, 8)))
    clouds = Image.new("L", (size, size))
    pen = ImageDraw.Draw(clouds)
    for _ in range(rng.randint(3, 4)):
        x, y = rng.uniform(0, size), rng.uniform(0, size)
        for _ in range(6):  # puffs along a flat base
            width = size * rng.uniform(0.09, 0.17)
            left = x + size * rng.uniform(-0.2, 0.2)
            pen.ellipse((left - width, y - width * 0.6, left + width, y + width * 0.35), fill=225)
    sky.paste((255, 255, 255), (0, 0), clouds.filter(ImageFilter.GaussianBlur(size / 50)))
    return sky


def _grass(size: int, rng: Random) -> Image.Image:
    field = _gradient(size, jitter((106, 162, 66), rng, 8), jitter((70, 128, 44), rng, 8))
    blades = _smooth(_noise(size, rng), 5, axis=0) * 100  # upright streaks
    return _to_image(field + blades[:, :, None] * np.array([0.8, 1.0, 0.5], np.float32))


def _checkered(size: int, rng: Random) -> Image.Image:
    cell = size / rng.choice((7.0, 8.0))
    across = np.floor((np.arange(size) + rng.uniform(0, cell)) / cell)
    dark = (across[:, None] + across[None, :]) % 2 == 1
    tiles = np.where(dark[:, :, None], jitter((186, 190, 196), rng, 5), jitter((240, 240, 238), rng, 4))
    return _to_image(tiles.astype(np.float32))


def _wood(size: int, rng: Random) -> Image.Image:
    planks = rng.choice((4, 5))
    board = np.arange(size) * planks // size  # (size,) which plank each row is of
    shade = np.array([rng.uniform(-10, 10) for _ in range(planks)], np.float32)[board]
    shade[1:][board[1:] != board[:-1]] -= 45  # the joints
    grain = _smooth(_noise(size, rng), 25, axis=1) * 90
    table = np.array(jitter((166, 116, 72), rng, 6), np.float32) + (shade[:, None] + grain)[:, :, None]
    return _to_image(table)


def _gradient(size: int, top: RGB, bottom: RGB) -> Pixels:
    """(size, size, 3) from one colour down to the other."""
    down = np.linspace(0, 1, size, dtype=np.float32)[:, None, None]
    rows = np.array(top, np.float32) * (1 - down) + np.array(bottom, np.float32) * down
    return np.repeat(rows, size, axis=1).astype(np.float32)


def _noise(size: int, rng: Random) -> Pixels:
    """(size, size) in -0.5 to 0.5, from Python's generator: numpy's may change between versions."""
    values = np.frombuffer(rng.randbytes(size * size), np.uint8)
    return np.asarray(values.reshape(size, size) / 255 - 0.5, np.float32)


def _smooth(values: Pixels, width: int, axis: int) -> Pixels:
    """The running mean over `width` pixels along an axis, wrapping around."""
    shifted = [np.roll(values, shift, axis) for shift in range(width)]
    return np.asarray(np.mean(shifted, axis=0), np.float32)


def _to_image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGB")


_PAINTERS: dict[str, Callable[[int, Random], Image.Image]] = {
    "white": _white,
    "night": _night,
    "sky": _sky,
    "grass": _grass,
    "checkered": _checkered,
    "wood": _wood,
}
