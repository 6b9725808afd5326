"""Which scenes make up each split of the data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random

from efficap.data.demo.scenes import Scene, sample_scene

SPLIT_SIZES: Mapping[str, int] = {"train": 2000, "val": 300, "test": 300, "irregular": 300}  # pictures


def sample_splits(seed: int, sizes: Mapping[str, int]) -> Iterator[tuple[str, str, Scene]]:
    """Yield (split, picture name, scene) for the whole data set; no scene comes twice in it.

    Every picture has chance of its own, so that a larger split begins with the pictures of a smaller one.
    """
    seen: set[Scene] = set()
    for split in SPLIT_SIZES:  # in this order, whatever that of `sizes`
        for number in range(sizes.get(split, 0)):
            name = f"{split}_{number:05d}"
            rng = Random(f"{seed} {name} scene")
            scene = sample_scene(rng, irregular=split == "irregular")
            while scene.description in seen:
                scene = sample_scene(rng, irregular=split == "irregular")
            seen.add(scene.description)
            yield split, name, scene
