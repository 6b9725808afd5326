"""Where the attention of colour and shape words falls on the built-in pictures, whose boxes are known.

    python bench/pointing.py RUN [--split test] [--rollout]

The run writes the captions of a split as it validated. Each word that names the colour or the shape of something in
the picture points at the middle of the latent position that it looked at most: a hit where that lies in a box of what
it names ("the pointing game", Zhang et al. 2016, https://arxiv.org/abs/1608.00507). Where a group of equal things is
named, any of their boxes counts, and chance is high; "one thing" are the words that name a single one.

chance   the share of the picture that these boxes take
hits     share of the words that point into a box of what they name, and how many times chance that is
middle   hits of the words of other pictures, as of a model that always looks where things mostly are
finer    hits, pointing at the attention's centre of mass over that position and those around it; its middle
inside   share of the attention that lies in the boxes; chance is the same
own      hits in pictures of two kinds of things, and
other    how often the word points at the other kind there

The last line is one JSON object, of the mean over layers and heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from efficap.commands.entry import compose, tune_process
from efficap.commands.subject import Subject, open_run
from efficap.data.demo.scenes import COLOURS, SHAPES
from efficap.training.writer import words_of

SIDE = 128  # places a side that a word can point at
NAMES = {name: ("colour", name) for name in COLOURS} | {
    form: ("shape", name) for name in SHAPES for form in (name, f"{name}s", f"{name}es")
}


@dataclass(frozen=True)
class Naming:
    """A word that names things in its picture.

    Attributes:
        picture: the picture's id.
        kind: ``colour`` or ``shape``.
        things: how many it names.
        named, other: (SIDE, SIDE), whether a place lies in a box of what it names, and of another thing.
        maps: (L, H, h, w), its attention.
    """

    picture: str
    kind: str
    things: int
    named: NDArray[np.bool_]
    other: NDArray[np.bool_]
    maps: NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run on the built-in pictures (data=demo)")
    parser.add_argument("--split", default="test", help="(default: test)")
    parser.add_argument("--rollout", action="store_true", help="follow the attention through the bridge")
    options = parser.parse_args()
    tune_process()
    subject = open_run(compose("eval", f"run={options.run}", f"split={options.split}"))
    boxes = pd.read_csv(Path(subject.data.root) / "boxes.csv")  # type: ignore[attr-defined]
    found, wrong = [], 0
    for naming in namings(subject, options.split, boxes, rollout=options.rollout):
        wrong += naming is None
        found += [naming] if naming else []
    mean = [word.maps.mean(axis=(0, 1)) for word in found]
    chosen = {
        "all words": [True] * len(found),
        "one thing": [word.things == 1 for word in found],
        "several": [word.things > 1 for word in found],
        "colours": [word.kind == "colour" for word in found],
        "shapes": [word.kind == "shape" for word in found],
    }
    rows = {name: measured(found, mean, np.array(which)) for name, which in chosen.items()}
    layers, heads = found[0].maps.shape[:2]
    for layer, head in np.ndindex(layers, heads):
        maps = [word.maps[layer, head] for word in found]
        rows[f"layer {layer + 1}, head {head + 1}"] = measured(found, maps, np.array(chosen["one thing"]))
    show(
        rows,
        f"{len(found):,} words, and {wrong:,} that name what is not there; heads: of words for one thing",
    )
    print(json.dumps({name: rows[name] for name in ("all words", "one thing")}))


def namings(subject: Subject, split: str, boxes: pd.DataFrame, *, rollout: bool) -> Iterator[Naming | None]:
    """The words of the captions that are a colour or a shape; None for one that nothing in the picture has."""
    of_picture = dict(tuple(boxes.groupby("file_name")))
    for images, image_ids, _ in subject.batches(split):
        written = subject.writer.write(images, image_ids, attention=True, by_head=True, rollout=rollout)
        for image_id, (caption, *_) in zip(image_ids, written, strict=True):
            things = of_picture[image_id]
            for word in words_of(caption, subject.writer.tokenizer):
                kind, name = NAMES.get(word.text.strip().lower(), ("", ""))
                if not kind:
                    continue
                is_named = things[kind] == name
                named, other = places(things[is_named]), places(things[~is_named])
                there = int(is_named.sum())
                yield Naming(image_id, kind, there, named, other, word.attention) if there else None


def places(boxes: pd.DataFrame) -> NDArray[np.bool_]:
    """(SIDE, SIDE), which places of a picture, each the middle of its square, lie in a box."""
    middles = (np.arange(SIDE) + 0.5) / SIDE
    inside = np.zeros((SIDE, SIDE), bool)
    for left, top, right, bottom in boxes[["left", "top", "right", "bottom"]].to_numpy():
        rows, columns = (middles > top) & (middles < bottom), (middles > left) & (middles < right)
        inside |= rows[:, None] & columns
    return inside


def pointed_at(map_: NDArray[np.float32], *, finer: bool = False) -> int:
    """The place, of SIDE x SIDE, that an (h, w) map points at."""
    height, width = map_.shape
    row, column = np.unravel_index(map_.argmax(), map_.shape)
    y, x = row + 0.5, column + 0.5
    if finer:
        around = np.zeros_like(map_)
        near = slice(max(0, row - 1), row + 2), slice(max(0, column - 1), column + 2)
        around[near] = map_[near]
        y = (around.sum(axis=1) * (np.arange(height) + 0.5)).sum() / around.sum()
        x = (around.sum(axis=0) * (np.arange(width) + 0.5)).sum() / around.sum()
    return int(y / height * SIDE) * SIDE + int(x / width * SIDE)


def measured(
    words: list[Naming], maps: list[NDArray[np.float32]], which: NDArray[np.bool_]
) -> dict[str, float]:
    """The figures of those of the words, with a map each, that are chosen."""
    named = np.stack([word.named.ravel() for word in words])  # (words, places)
    other = np.stack([word.other.ravel() for word in words])
    pictures = np.array([word.picture for word in words])
    peaks, finer = np.array([[pointed_at(map_, finer=fine) for map_ in maps] for fine in (False, True)])
    each = np.arange(len(words))
    chosen = each[which]
    two = which & other.any(axis=1)
    shares = [blocks(map_) / map_.sum() for map_ in maps]
    chance = named[which].mean()

    def middle(pointed: NDArray[np.int64]) -> float:
        return float(np.mean([named[i, pointed[pictures != pictures[i]]].mean() for i in chosen]))

    figures = {
        "words": len(chosen),
        "chance": chance,
        "hits": named[each, peaks][which].mean(),
        "times": named[each, peaks][which].mean() / chance,
        "middle": middle(peaks),
        "finer": named[each, finer][which].mean(),
        "finer times": named[each, finer][which].mean() / chance,
        "finer middle": middle(finer),
        "inside": np.mean([shares[i][words[i].named].sum() for i in chosen]),
        "own": named[each, peaks][two].mean(),
        "other": other[each, peaks][two].mean(),
    }
    return {name: round(float(value), 3) for name, value in figures.items()}


def blocks(map_: NDArray[np.float32]) -> NDArray[np.float32]:
    """An (h, w) map as (SIDE, SIDE), each position's share spread over its square."""
    height, width = map_.shape
    rows, columns = np.arange(SIDE) * height // SIDE, np.arange(SIDE) * width // SIDE
    spread = map_[rows[:, None], columns]
    return spread * (map_.sum() / spread.sum())


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("attention")
    for name in rows["all words"]:
        table.add_column(name.removeprefix("finer "), justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{value:g}" for value in figures.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
