"""What a scene is, how one is sampled, and which combinations only the irregular split may show.

All lengths are fractions of the picture's side; y points down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from random import Random
from typing import NamedTuple

from efficap.data.demo import layout
from efficap.data.demo.layout import Spot

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
TEXTURES = {"plain": 0.6, "striped": 0.2, "spotted": 0.2}  # name -> how often it is drawn
LENGTHS = ("small", "large")

# Each background with the colours that would be hard to see, or to name, on it.
BACKGROUNDS: dict[str, frozenset[str]] = {
    "white": frozenset({"yellow"}),
    "night": frozenset({"blue", "purple"}),
    "sky": frozenset({"blue"}),
    "grass": frozenset({"green"}),
    "checkered": frozenset(),
    "wood": frozenset({"orange", "red"}),
}

# The combinations that only the irregular split shows. Each of their colours, shapes and textures is common
# in training with other partners: a captioner has the words for them and must combine them anew.
ODD_COLOURS = frozenset(
    {
        ("purple", "circle"),
        ("green", "square"),
        ("blue", "triangle"),
        ("red", "star"),
        ("orange", "heart"),
        ("yellow", "cross"),
    }
)
ODD_TEXTURES = frozenset({("striped", "star"), ("spotted", "square")})

# A shape inside another needs colours that stay apart where they touch.
CLOSE_COLOURS = frozenset(
    map(
        frozenset,
        (
            ("red", "orange"),
            ("red", "pink"),
            ("red", "purple"),
            ("orange", "yellow"),
            ("blue", "purple"),
            ("pink", "purple"),
        ),
    )
)
ROOMY_SHAPES = ("circle", "square", "heart")  # those that hold a small shape when large

KINDS = {"single": 0.38, "group": 0.34, "pair": 0.14, "inside": 0.05, "crowd": 0.09}


class Look(NamedTuple):
    """What the eye tells of an object apart from where it is."""

    size: str
    texture: str
    colour: str
    shape: str

    @property
    def is_odd(self) -> bool:
        """Whether the combination is held out from the training, validation and test splits."""
        return (self.colour, self.shape) in ODD_COLOURS or (self.texture, self.shape) in ODD_TEXTURES


class Part(NamedTuple):
    """Equal objects: one look at one to four spots."""

    look: Look
    spots: tuple[Spot, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture, before it is drawn.

    Attributes:
        parts: one part, or two that differ in colour and shape; a speaker starts with the first.
        relation: where the first part lies: ``left``, ``right``, ``above`` or ``below`` the second or
            ``inside`` it; ``and`` where they are merely both there; empty with one part.
        background: a key of `BACKGROUNDS`.
        grain: seeds what no caption mentions: shades of a colour, clouds, grass.
    """

    parts: tuple[Part, ...]
    relation: str
    background: str
    grain: int

    @property
    def description(self) -> Scene:
        """The scene without its grain: two pictures with the same description are duplicates."""
        return replace(self, grain=0)


_ALL_LOOKS = tuple(Look(*values) for values in product(LENGTHS, TEXTURES, COLOURS, SHAPES))
_REGULAR_LOOKS = tuple(look for look in _ALL_LOOKS if not look.is_odd)
_ODD_LOOKS = tuple(look for look in _ALL_LOOKS if look.is_odd)


def sample_scene(rng: Random, *, irregular: bool = False) -> Scene:
    """Draw a scene.

    Args:
        rng: the only source of chance.
        irregular: whether one of the objects shows a held-out combination; without it, none does.
    """
    kind = rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
    looks = [_sample_look(rng, odd=irregular)]
    if kind in ("pair", "inside", "crowd"):
        looks.append(_sample_partner(rng, looks[0], apart=kind == "inside"))
        rng.shuffle(looks)  # so that the odd one is not always the first
    if kind == "inside":
        parts, relation = _inside(rng, looks)
    elif kind == "pair":
        parts, relation = _pair(rng, looks)
    else:
        parts, relation = _scattered(rng, looks, single=kind == "single")
    colours = {part.look.colour for part in parts}
    background = rng.choice([name for name, hidden in BACKGROUNDS.items() if not colours & hidden])
    return Scene(parts, relation, background, grain=rng.getrandbits(32))


def _sample_look(rng: Random, *, odd: bool = False) -> Look:
    looks = _ODD_LOOKS if odd else _REGULAR_LOOKS
    return rng.choices(looks, [TEXTURES[look.texture] for look in looks])[0]


def _sample_partner(rng: Random, first: Look, *, apart: bool) -> Look:
    """A regular look that shares neither colour nor shape with `first`; `apart`: nor a similar colour."""
    while True:
        look = _sample_look(rng)
        close = apart and frozenset((look.colour, first.colour)) in CLOSE_COLOURS
        if look.colour != first.colour and look.shape != first.shape and not close:
            return look


def _inside(rng: Random, looks: list[Look]) -> tuple[tuple[Part, ...], str]:
    # The odd look of an irregular scene goes inside, for the outer one is replaced until it is roomy. Made
    # plain, a regular look stays regular; an odd texture stays, for the inner one keeps its own.
    inner, outer = sorted(looks, key=lambda look: not look.is_odd)
    while outer.shape not in ROOMY_SHAPES:
        outer = _sample_partner(rng, inner, apart=True)
    inner, outer = inner._replace(size="small"), outer._replace(size="large", texture="plain")
    spots = layout.nested(rng)
    return (Part(inner, spots[:1]), Part(outer, spots[1:])), "inside"


def _pair(rng: Random, looks: list[Look]) -> tuple[tuple[Part, ...], str]:
    # A speaker places the small thing by the large one, and equals in reading order.
    first, second = sorted(looks, key=lambda look: look.size == "large")
    relation = rng.choice(
        ("left", "above") if first.size == second.size else ("left", "right", "above", "below")
    )
    spots = layout.beside(rng, relation, (first.size, second.size))
    return (Part(first, spots[:1]), Part(second, spots[1:])), relation


def _scattered(rng: Random, looks: list[Look], *, single: bool) -> tuple[tuple[Part, ...], str]:
    counts = [1] if single else [rng.choice((2, 3, 4))] if len(looks) == 1 else [rng.choice((2, 3)), 1]
    sizes = [look.size for look, count in zip(looks, counts, strict=True) for _ in range(count)]
    spots = layout.scatter(rng, sizes)
    parts = Part(looks[0], spots[: counts[0]]), Part(looks[-1], spots[counts[0] :])
    return parts[: len(looks)], "and" if len(looks) == 2 else ""
