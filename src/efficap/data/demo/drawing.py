"""Draws a scene with Pillow: each object four times too large, then reduced, so that its edges are smooth."""

from __future__ import annotations

from math import ceil, cos, pi, sin
from random import Random

from PIL import Image, ImageDraw, ImageFilter

from efficap.data.demo.backgrounds import RGB, draw_background, jitter
from efficap.data.demo.layout import Spot
from efficap.data.demo.scenes import Look, Scene

_SCALE = 4  # how much larger objects are drawn
_WHITE = (255, 255, 255)

# Each colour with the one its stripes and spots are drawn in, chosen to stand out on it.
_PAINT: dict[str, tuple[RGB, RGB]] = {
    "red": ((222, 32, 38), _WHITE),
    "orange": ((250, 128, 14), (140, 56, 0)),
    "yellow": ((255, 218, 20), (140, 92, 0)),
    "green": ((24, 158, 62), _WHITE),
    "blue": ((32, 82, 222), _WHITE),
    "purple": ((128, 44, 176), _WHITE),
    "pink": ((255, 132, 196), (170, 24, 108)),
}

Point = tuple[float, float]


def draw_scene(scene: Scene, image_size: int) -> Image.Image:
    """The picture of a scene, `image_size` pixels square, RGB."""
    rng = Random(scene.grain)
    picture = draw_background(scene.background, image_size, rng)
    for part in reversed(scene.parts):  # the first part may lie inside the second
        for spot in part.spots:
            _draw_object(picture, part.look, spot, rng)
    return picture


def bounding_box(look: Look, spot: Spot) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is seen of an object but its shadow, as fractions of the picture's side."""
    corners = _tilted(_outline(look.shape), spot.tilt)
    across = [min(1.0, max(0.0, spot.x + x * spot.diameter / 2)) for x, _ in corners]
    down = [min(1.0, max(0.0, spot.y + y * spot.diameter / 2)) for _, y in corners]
    return min(across), min(down), max(across), max(down)


def _draw_object(picture: Image.Image, look: Look, spot: Spot, rng: Random) -> None:
    diameter = spot.diameter * picture.width
    side = ceil(diameter * 1.5)  # room for corners, edge and shadow
    large = side * _SCALE
    middle, radius = large / 2, diameter * _SCALE / 2
    corners = [
        (middle + radius * x, middle + radius * y) for x, y in _tilted(_outline(look.shape), spot.tilt)
    ]

    base, marks = _PAINT[look.colour]
    base = jitter(base, rng, 10)
    ink = Image.new("RGB", (large, large), base)
    _draw_texture(ImageDraw.Draw(ink), look.texture, marks, middle, radius, rng)
    edge = tuple(round(channel * 0.62) for channel in base)
    pen = ImageDraw.Draw(ink)
    pen.line([*corners, corners[0], corners[1]], fill=edge, width=max(2, round(radius * 0.09)), joint="curve")
    shape = Image.new("L", (large, large))
    ImageDraw.Draw(shape).polygon(corners, fill=255)

    ink, shape = ink.reduce(_SCALE), shape.reduce(_SCALE)
    left, top = round(spot.x * picture.width - side / 2), round(spot.y * picture.height - side / 2)
    drop = max(1, round(picture.width / 64))
    shadow = shape.filter(ImageFilter.GaussianBlur(drop)).point([value * 2 // 5 for value in range(256)])
    picture.paste((0, 0, 0), (left + drop // 2, top + drop), shadow)
    picture.paste(ink, (left, top), shape)


def _draw_texture(
    pen: ImageDraw.ImageDraw, texture: str, marks: RGB, middle: float, radius: float, rng: Random
) -> None:
    if texture == "plain":
        return
    # A few marks across a small object, more across a large one, none too fine for 128 pixels.
    pitch = max(radius * 0.36, 6.5 * _SCALE)
    phase = rng.uniform(-0.5, 0.5) * pitch
    reach = ceil(1.5 * radius / pitch)
    for row in range(-reach, reach + 1):
        at = middle + phase + row * pitch
        if texture == "striped":
            slope = radius * 0.5  # leaning, unlike any edge of a square
            pen.line(
                [(at - 2 * slope, middle + 2 * radius), (at + 2 * slope, middle - 2 * radius)],
                marks,
                round(pitch * 0.36),
            )
            continue
        for column in range(-reach, reach + 1):
            x = middle + (column + row % 2 / 2) * pitch * 1.15
            dot = pitch * 0.29
            pen.ellipse((x - dot, at - dot, x + dot, at + dot), fill=marks)


def _outline(shape: str) -> list[Point]:
    """The corners of a shape around the origin, about as large to the eye as a circle of radius 1."""
    if shape == "circle":
        return [_on_circle(turn / 48, 1.0) for turn in range(48)]
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0.0, -1.05), (1.02, 0.8), (-1.02, 0.8)]
    if shape == "star":
        return [_on_circle(turn / 10, 0.52 if turn % 2 else 1.18) for turn in range(10)]
    if shape == "heart":
        turns = [2 * pi * turn / 48 for turn in range(48)]
        return [
            (sin(t) ** 3 * 1.06, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 15.5 - 0.08)
            for t in turns
        ]
    arm, reach = 0.34, 1.02  # a cross
    quarter = [(-arm, -reach), (arm, -reach), (arm, -arm)]
    turned = [(-y, x) for x, y in quarter]
    return [*quarter, *turned, *((-x, -y) for x, y in quarter), *((-x, -y) for x, y in turned)]


def _on_circle(turn: float, radius: float) -> Point:
    return radius * sin(2 * pi * turn), -radius * cos(2 * pi * turn)


def _tilted(corners: list[Point], degrees: float) -> list[Point]:
    c, s = cos(degrees * pi / 180), sin(degrees * pi / 180)
    return [(c * x - s * y, s * x + c * y) for x, y in corners]
