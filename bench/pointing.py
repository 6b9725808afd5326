"""Where the attention of colour and shape words falls on the built-in pictures, whose boxes are known.

    python bench/pointing.py RUN [--split test] [--rollout]

The run writes the captions of a split as it validated. Each word that names the colour or the shape of something in
the picture points at the place where its attention, drawn over the picture, is largest: a hit where that lies in a box
of what it names ("the pointing game", Zhang et al. 2016, https://arxiv.org/abs/1608.00507).

hits     share of the words that point into a box of what they name
chance   the share of the picture that these boxes take
middle   how often the words of other pictures point into them, as a model would that always looks at the middle
inside   share of the attention, not just of its largest place, that lies in the boxes; chance is the same
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

import hydra
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from efficap.commands.entry import CONF, plain, tune_process
from efficap.commands.subject import Subject, open_run
from efficap.data.demo.scenes import COLOURS, SHAPES
from efficap.evaluation.attention import enlarged

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
        named, other: (SIDE, SIDE), whether a place lies in a box of what it names, and of another thing.
        maps: (L, H, h, w), its attention.
    """

    picture: str
    kind: str
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
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        subject = open_run(plain(hydra.compose("eval", [f"run={options.run}", f"split={options.split}"])))
    boxes = pd.read_csv(Path(subject.data.root) / "boxes.csv")  # type: ignore[attr-defined]
    found, wrong = [], 0
    for naming in namings(subject, options.split, boxes, rollout=options.rollout):
        wrong += naming is None
        found += [naming] if naming else []
    everything = {"mean": [word.maps.mean(axis=(0, 1)) for word in found]}
    layers, heads = found[0].maps.shape[:2]
    for layer in range(layers):
        for head in range(heads):
            everything[f"layer {layer + 1}, head {head + 1}"] = [word.maps[layer, head] for word in found]
    rows = {name: measured(found, maps) for name, maps in everything.items()}
    for kind in ("colour", "shape"):
        chosen = [word for word in found if word.kind == kind]
        rows[f"mean, {kind} words"] = measured(chosen, [word.maps.mean(axis=(0, 1)) for word in chosen])
    show(rows, f"{len(found):,} words; {wrong:,} name what is not there")
    print(json.dumps({name: round(value, 4) for name, value in rows["mean"].items()}))


def namings(subject: Subject, split: str, boxes: pd.DataFrame, *, rollout: bool) -> Iterator[Naming | None]:
    """The words of the captions that are a colour or a shape; None for one that nothing in the picture has."""
    of_picture = dict(tuple(boxes.groupby("file_name")))
    for images, image_ids, _ in subject.batches(split):
        written = subject.writer.write(images, image_ids, attention=True, by_head=True, rollout=rollout)
        for image_id, (caption, *_) in zip(image_ids, written, strict=True):
            things = of_picture[image_id]
            for word in subject.writer.words(caption):
                kind, name = NAMES.get(word.text.strip().lower(), ("", ""))
                if kind:
                    is_named = things[kind] == name
                    yield (
                        Naming(
                            image_id,
                            kind,
                            places(things[is_named]),
                            places(things[~is_named]),
                            word.attention,
                        )
                        if is_named.any()
                        else None
                    )


def places(boxes: pd.DataFrame) -> NDArray[np.bool_]:
    """(SIDE, SIDE), which places of a picture, each the middle of its square, lie in a box."""
    middles = (np.arange(SIDE) + 0.5) / SIDE
    inside = np.zeros((SIDE, SIDE), bool)
    for left, top, right, bottom in boxes[["left", "top", "right", "bottom"]].to_numpy():
        rows, columns = (middles > top) & (middles < bottom), (middles > left) & (middles < right)
        inside |= rows[:, None] & columns
    return inside


def measured(words: list[Naming], maps: list[NDArray[np.float32]]) -> dict[str, float]:
    """The figures of words with a map each, (h, w)."""
    drawn = [enlarged(map_, SIDE, SIDE) for map_ in maps]
    peaks = np.array([map_.argmax() for map_ in drawn])
    named = np.stack([word.named.ravel() for word in words])  # (words, places)
    other = np.stack([word.other.ravel() for word in words])
    hits = named[np.arange(len(words)), peaks]
    two = other.any(axis=1)
    pictures = np.array([word.picture for word in words])
    elsewhere = [named[i, peaks[pictures != pictures[i]]].mean() for i in range(len(words))]
    inside = [map_[word.named].sum() / map_.sum() for word, map_ in zip(words, drawn, strict=True)]
    chance = float(named.mean())
    return {
        "hits": float(hits.mean()),
        "chance": chance,
        "times": float(hits.mean()) / chance,
        "middle": float(np.mean(elsewhere)),
        "inside": float(np.mean(inside)),
        "own": float(hits[two].mean()),
        "other": float(other[np.arange(len(words)), peaks][two].mean()),
    }


def show(rows: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("attention")
    for name in rows["mean"]:
        table.add_column(name, justify="right")
    for name, figures in rows.items():
        table.add_row(name, *(f"{value:.3f}" for value in figures.values()))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
