"""Where the objects of a scene lie: apart from each other, in the picture, and as their relation says."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot
from random import Random
from typing import NamedTuple

# Diameters as fractions of the side. At 128 pixels: small 31 to 35, large 54 to 60, in a crowd 47 to 51.
_DIAMETERS = {"small": (0.24, 0.27), "large": (0.42, 0.47)}
_CROWDED_LARGE = (0.37, 0.40)  # four of these still fit
_GAP = 0.05  # between objects, and to the border
_TILT = 8.0  # degrees either way


class Spot(NamedTuple):
    """The place of one object: its centre, the diameter of the circle around it, its tilt in degrees."""

    x: float
    y: float
    diameter: float
    tilt: float


def scatter(rng: Random, sizes: Sequence[str]) -> tuple[Spot, ...]:
    """Spots anywhere in the picture for up to four objects of these sizes."""
    crowded = len(sizes) > 2 and "large" in sizes
    diameters = [_diameter(rng, size, crowded=crowded) for size in sizes]
    if crowded:  # chance would hardly ever find room for them
        return _quarters(rng, diameters)
    while True:  # starts over when the first ones leave no room: a few tries
        spots: list[Spot] = []
        for diameter in diameters:
            low, high = _GAP + diameter / 2, 1 - _GAP - diameter / 2
            spot = _spot(rng, rng.uniform(low, high), rng.uniform(low, high), diameter)
            if any(_overlap(spot, other) for other in spots):
                break
            spots.append(spot)
        else:
            return tuple(spots)


def _quarters(rng: Random, diameters: Sequence[float]) -> tuple[Spot, ...]:
    """One object in each quarter of the picture, or in some of them."""
    corners = rng.sample([(x, y) for x in (0.0, 0.5) for y in (0.0, 0.5)], len(diameters))
    spots = []
    for diameter, (left, top) in zip(diameters, corners, strict=True):
        low, high = (_GAP + diameter) / 2, 0.5 - (_GAP + diameter) / 2
        spots.append(_spot(rng, left + rng.uniform(low, high), top + rng.uniform(low, high), diameter))
    return tuple(spots)


def beside(rng: Random, relation: str, sizes: tuple[str, str]) -> tuple[Spot, Spot]:
    """Two spots, the first ``left``, ``right``, ``above`` or ``below`` the second, beyond doubt."""
    crowded = sizes == ("large", "large")  # in a row, two of full size leave no gap
    first, second = (_diameter(rng, size, crowded=crowded) for size in sizes)
    before = relation in ("left", "above")
    low, high = (first, second) if before else (second, first)
    room = 1 - low - high - 3 * _GAP
    start, between = rng.uniform(0, room / 2), rng.uniform(0, room / 2)
    low_at = _GAP + start + low / 2
    high_at = low_at + low / 2 + _GAP + between + high / 2
    along = (low_at, high_at) if before else (high_at, low_at)
    level = rng.uniform(0.4, 0.6)
    across = (level + rng.uniform(-0.05, 0.05), level + rng.uniform(-0.05, 0.05))
    if relation in ("left", "right"):
        return _spot(rng, along[0], across[0], first), _spot(rng, along[1], across[1], second)
    return _spot(rng, across[0], along[0], first), _spot(rng, across[1], along[1], second)


def nested(rng: Random) -> tuple[Spot, Spot]:
    """Two spots, the first inside the second."""
    outer, inner = rng.uniform(0.64, 0.74), _diameter(rng, "small")
    x, y = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58)
    return _spot(rng, x, y, inner), _spot(rng, x, y, outer)


def _diameter(rng: Random, size: str, *, crowded: bool = False) -> float:
    return rng.uniform(*(_CROWDED_LARGE if crowded and size == "large" else _DIAMETERS[size]))


def _overlap(one: Spot, other: Spot) -> bool:
    return hypot(one.x - other.x, one.y - other.y) < (one.diameter + other.diameter) / 2 + _GAP


def _spot(rng: Random, x: float, y: float, diameter: float) -> Spot:
    return Spot(round(x, 4), round(y, 4), round(diameter, 4), round(rng.uniform(-_TILT, _TILT), 1))
