"""The runs to compare: found below folders and read from their files alone."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efficap.errors import InputError, first_of
from efficap.evaluation.pictures import PICTURES_FILE, PictureRecord, read_pictures
from efficap.evaluation.results import read_predictions, read_scores
from efficap.yaml_files import read_yaml

CONFIG_FILE = "config.yaml"
_KEYS = {"name", "model", "data"}
_CLOSE = 1e-6  # between a score and the mean over the pictures that it was computed from
METRICS = ("CIDEr", "BLEU-4", "METEOR", "ROUGE-L")


@dataclass(frozen=True)
class Evaluation:
    """What eval.py left of one run on one split.

    Attributes:
        scores: of scores.json.
        image_ids: sorted.
        pictures: in the order of `image_ids`; empty where there is no file of them.
    """

    scores: dict[str, Any]
    image_ids: list[str]
    pictures: list[PictureRecord]

    @property
    def resampled(self) -> bool:
        """Whether every picture has its part in the scores, so that they can be resampled."""
        return bool(self.pictures) and all(picture.scores for picture in self.pictures)


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: links resolved.
        config: of config.yaml.
        metrics: of metrics.json; empty where training has not validated yet.
        evaluations: by split, those that have scores; empty where eval.py was not run.
    """

    path: Path
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluations: dict[str, Evaluation]

    @functools.cached_property
    def seed(self) -> int | None:
        return self.config.get("seed")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Run directories, by their config.yaml: each of `folders` itself, or all below it; sorted, each once.

    Raises:
        InputError: a folder does not exist, or there is no run in or below any.
    """
    found: dict[Path, None] = {}
    empty = []
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{folder} is no folder; give run directories, or a sweep's such as outputs/sweeps/*"
            )
        below = sorted(_below(folder.resolve()))
        if not below:
            empty.append(folder)
        found |= dict.fromkeys(below)
    if empty and not found:
        raise InputError(
            f"{empty[0]} holds no run: there is no config.yaml in it or below; give run directories, or a sweep's"
        )
    for folder in empty:  # as of a training that was refused
        print(f"{folder} holds no run, and is left out", file=sys.stderr)
    return list(found)


def _below(folder: Path) -> Iterable[Path]:
    for path, folders, files in os.walk(folder):
        if CONFIG_FILE in files:
            yield Path(path)
            folders.clear()  # what a run holds, such as an export, is no run of its own
        # .hydra and W&B's own runs have a config.yaml, too
        folders[:] = [name for name in folders if not name.startswith(".") and name != "wandb"]


def read_run(path: Path) -> Run:
    """Read what a comparison needs of a run directory.

    Raises:
        InputError: a file is damaged, or the files of an evaluation do not belong together.
    """
    metrics = path / "metrics.json"
    evaluations = {
        folder.name: evaluation
        for folder in sorted(file.parent for file in path.glob("eval/*/scores.json"))
        if (folder / "captions.json").is_file()  # what is published has scores alone
        for evaluation in [_evaluation(folder)]
        if any(isinstance(evaluation.scores.get(metric), float) for metric in METRICS)
    }
    return Run(
        path, _config(path / CONFIG_FILE), read_scores(metrics) if metrics.is_file() else {}, evaluations
    )


def _config(file: Path) -> dict[str, Any]:
    config = read_yaml(file)
    if not isinstance(config, dict) or not config.keys() >= _KEYS or not isinstance(config["data"], dict):
        raise InputError(f"{file} is no run's configuration: it lacks one of {', '.join(sorted(_KEYS))}")
    return config


def _evaluation(folder: Path) -> Evaluation:
    scores, captions = read_scores(folder / "scores.json"), read_predictions(folder / "captions.json")
    image_ids = sorted(captions)
    file = folder / PICTURES_FILE
    if not file.is_file():
        return Evaluation(scores, image_ids, [])
    pictures = sorted(read_pictures(file), key=lambda picture: picture.image_id)
    same = {picture.image_id: picture.caption for picture in pictures} == captions and len(pictures) == len(
        captions
    )
    evaluation = Evaluation(scores, image_ids, pictures)
    cider = scores.get("CIDEr")
    if same and evaluation.resampled and isinstance(cider, float):
        mean = sum(picture.scores.cider for picture in pictures if picture.scores) / len(pictures)
        same = abs(mean - cider) < _CLOSE
    if not same:
        raise InputError(
            f"{folder}: captions.json, scores.json and {file.name} are of different evaluations; run eval.py again"
        )
    return evaluation


def check_same_pictures(runs: Sequence[Run], split: str) -> None:
    """Raises InputError where runs were evaluated on different pictures, or against different references.

    CIDEr takes its document frequencies from the references, so that scores of different sets cannot be compared.
    """
    evaluated = [run for run in runs if split in run.evaluations]
    first = evaluated[0]
    ids = first.evaluations[split].image_ids
    for run in evaluated[1:]:
        others = run.evaluations[split].image_ids
        if others != ids:
            raise InputError(
                f"{split}: {first.path} has {_surplus(ids, others)} and {run.path} has {_surplus(others, ids)}; only "
                "runs evaluated on the same pictures can be compared"
            )
    with_references = [run for run in evaluated if run.evaluations[split].pictures]
    for run in with_references[1:]:
        _check_references(with_references[0], run, split)


def _surplus(ids: Sequence[str], others: Sequence[str]) -> str:
    only = sorted(set(ids) - set(others))
    named = f" ({first_of(map(repr, only))})" if only else ""
    return f"{len(ids):,} pictures, {len(only):,} of its own{named}"


def _check_references(first: Run, run: Run, split: str) -> None:
    pairs = zip(first.evaluations[split].pictures, run.evaluations[split].pictures, strict=True)
    for one, other in pairs:
        if sorted(one.references) != sorted(other.references):
            raise InputError(
                f"{split}: the references of {one.image_id!r} differ between {first.path} ({len(one.references)}) and "
                f"{run.path} ({len(other.references)}); evaluate both on the same table"
            )
