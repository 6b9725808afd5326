"""The grammar that puts a scene into words, as several people would: mostly alike, never quite."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from efficap.data.demo.scenes import Part, Scene

REFERENCES = 5  # for each picture

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
_TEXTURES = {"striped": ("striped", "with stripes"), "spotted": ("spotted", "with spots")}
_PLURALS = {"cross": "crosses"}
_PLACES = {  # the usual words, then the occasional ones
    "white": ("on a white background", "against a white wall"),
    "night": ("in the night sky", "in the sky at night"),
    "sky": ("in a cloudy sky", "among the clouds"),
    "grass": ("on the grass", "on a lawn"),
    "checkered": ("on a checkered floor", "on checkered tiles"),
    "wood": ("on a wooden table", "on wooden boards"),
}
_RELATIONS = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
    "inside": "inside",
    "and": "and",
}
_OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above", "and": "and"}


@dataclass(frozen=True, slots=True)
class Wording:
    """One speaker's choices; the defaults are the commonest.

    Attributes:
        frame: what stands around the description.
        size: whether sizes are told.
        rare_size: whether as "little" and "big".
        texture_after: whether a texture follows its shape ("with stripes").
        place: whether the background is told.
        rare_place: whether in its less usual words.
        turned: whether to start with the second part, or to call equal objects a pair or a group.
    """

    frame: str = "{}"
    size: bool = True
    rare_size: bool = False
    texture_after: bool = False
    place: bool = True
    rare_place: bool = False
    turned: bool = False


_FRAMES = {"{}": 0.7, "there {be} {}": 0.2, "a picture of {}": 0.1}


def write_references(scene: Scene, rng: Random) -> list[str]:
    """Five captions of a scene, all different."""
    captions: dict[str, None] = {}  # in order, each once
    while len(captions) < REFERENCES:
        captions[write_caption(scene, _sample_wording(rng))] = None
    return list(captions)


def write_caption(scene: Scene, wording: Wording = Wording()) -> str:
    """The caption of a scene in one wording; without one, the caption that most people would write."""
    first, *rest = (_describe(part, wording) for part in scene.parts)
    count = len(scene.parts[0].spots)
    if not rest:
        content = first
        if wording.turned and count > 1:
            content = "a pair of " + first.removeprefix("two ") if count == 2 else f"a group of {first}"
            count = 1  # "there is a group"
    elif not wording.turned:
        content = f"{first} {_RELATIONS[scene.relation]} {rest[0]}"
    else:
        count = len(scene.parts[1].spots)
        if scene.relation == "inside":
            content = f"{rest[0]} with {first} inside"
        else:
            content = f"{rest[0]} {_RELATIONS[_OPPOSITES[scene.relation]]} {first}"
    if wording.place:
        content += " " + _PLACES[scene.background][wording.rare_place]
    return wording.frame.format(content, be="are" if count > 1 else "is")


def _sample_wording(rng: Random) -> Wording:
    frame = rng.choices(tuple(_FRAMES), tuple(_FRAMES.values()))[0]
    return Wording(
        frame=frame,
        size=rng.random() < 0.8,
        rare_size=rng.random() < 0.1,
        texture_after=rng.random() < 0.12,
        place=rng.random() < 0.75,
        rare_place=rng.random() < 0.12,
        turned=rng.random() < 0.12,
    )


def _describe(part: Part, wording: Wording) -> str:
    """A part as a noun phrase: "three large striped red circles"."""
    look, count = part.look, len(part.spots)
    words = [_SIZES[look.size][wording.rare_size]] if wording.size else []
    texture, after = _TEXTURES.get(look.texture, ("", ""))
    if texture and not wording.texture_after:
        words.append(texture)
    words.append(look.colour)
    words.append(look.shape if count == 1 else _PLURALS.get(look.shape, look.shape + "s"))
    if texture and wording.texture_after:
        words.append(after)
    number = _NUMBERS.get(count, "an" if words[0][0] in "aeiou" else "a")
    return " ".join([number, *words])
