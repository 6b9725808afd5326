"""Runs that differ in nothing but the seed are one model, under a name that says how it differs from the others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from efficap.evaluation.compare.runs import CONFIG_FILE, Run
from efficap.yaml_files import read_yaml

# What changes no score by intention, wherever it stands in the configuration.
_UNSEEN = {
    "callbacks",
    "checkpoint",
    "compile",
    "devices",
    "enable_progress_bar",
    "feature_cache_dir",
    "gradient_checkpointing",
    "image_dir",
    "index_dir",
    "log_every_n_steps",
    "logger",
    "max_bad_fraction",
    "max_bad_steps",
    "num_threads",
    "num_workers",
    "output_dir",
    "read_timeout",
    "resume",
    "seed",
}
_NAMED = 3  # settings that a name gives


@dataclass(frozen=True)
class Group:
    """Runs of one model, which differ by their seeds.

    Attributes:
        name: of all models in a comparison, this one's alone.
        model: its part that says the model.
        data: what it was trained on.
        runs: by seed.
    """

    name: str
    model: str
    data: str
    runs: list[Run]

    @property
    def parameters(self) -> int | None:
        return next((run.metrics["parameters"] for run in self.runs if run.metrics.get("parameters")), None)

    def evaluated(self, split: str) -> list[Run]:
        return [run for run in self.runs if split in run.evaluations]


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs whose configurations are equal but for the seed, where pictures lie, and what changes no score (`_UNSEEN`).

    What they start from (``init_from``) must be runs of one model, too.

    A group is named by the setting ``name`` of its runs, which without another choice is ``<model>-<data>``. Where
    several groups have that name, as in a sweep over a learning rate, it is followed by the settings in which they
    differ, the last two parts of their keys, at most three of them, and by a number should that not tell them apart.
    """
    members: dict[frozenset[tuple[str, str]], list[Run]] = {}
    for run in runs:
        members.setdefault(frozenset(_settings(run.config).items()), []).append(run)
    names = [f"{run.config['name']}" for run, *_ in members.values()]
    suffixes = []
    for settings, name in zip(members, names, strict=True):
        namesakes = [dict(other) for other, theirs in zip(members, names, strict=True) if theirs == name]
        suffixes.append(_differences(dict(settings), namesakes))
    taken: Counter[str] = Counter()
    groups = []
    for own, name, suffix in zip(members.values(), names, suffixes, strict=True):
        taken[name + suffix] += 1
        if (number := taken[name + suffix]) > 1:
            suffix += f" ({number})"
        data = own[0].config["data"]
        model = without_data(name, data) + suffix
        seeded = sorted(own, key=lambda run: (run.seed is None, run.seed, run.path))
        groups.append(Group(name + suffix, model, _data(data)[1], seeded))
    return groups


def _settings(config: dict[str, Any], above: str = "") -> dict[str, str]:
    """Dotted key -> value as text, for all that counts."""
    settings: dict[str, str] = {}
    for key, value in config.items():
        if key in _UNSEEN:
            continue
        if isinstance(value, dict):
            settings |= _settings(value, f"{above}{key}.")
        elif key == "init_from" and value is not None:
            settings[f"{above}{key}"] = _origin(Path(str(value)))
        else:
            settings[f"{above}{key}"] = str(value)
    return settings


def _origin(run: Path) -> str:
    """The model that a run began with: of several seeds of it the same."""
    file = run / CONFIG_FILE
    config = read_yaml(file) if file.is_file() else None
    if not isinstance(config, dict) or "name" not in config:
        return str(run)
    digest = hashlib.blake2b(repr(sorted(_settings(config).items())).encode(), digest_size=2)
    return f"{config['name']} {digest.hexdigest()}"


def _differences(settings: dict[str, str], namesakes: Sequence[dict[str, str]]) -> str:
    keys = dict.fromkeys(key for other in namesakes for key in other)
    differing = [key for key in keys if len({other.get(key) for other in namesakes}) > 1]
    shown = [(".".join(key.split(".")[-2:]), settings[key]) for key in sorted(differing) if key in settings]
    parts = list(dict.fromkeys(f"{key}={value}" for key, value in shown))
    return "".join(f" {part}" for part in parts[:_NAMED]) + (" …" if len(parts) > _NAMED else "")


def without_data(name: str, data: dict[str, Any]) -> str:
    """A run's name without its data: ``small`` of ``small-csv``, and of ``small-coco`` with a table in ``coco/``."""
    choice, shown = _data(data)
    ends = (f"-{choice}", f"-{shown.partition('/')[0]}")
    return next((name.removesuffix(end) for end in ends if name.endswith(end)), name)


def _data(settings: dict[str, Any]) -> tuple[str, str]:
    """The kind of a data set, as ``csv``, ``?`` for a user's own class, and words, as ``flickr8k/captions.csv``."""
    parts = str(settings.get("_target_", "")).split(".")  # efficap.data.csv.CSVDataModule
    choice = parts[2] if len(parts) > 3 else "?"
    if "sources" in settings:
        return choice, " + ".join(_data(source)[1] for source in settings["sources"].values())
    place = settings.get("shards") or settings.get("table")
    if isinstance(place, dict | list):
        place = next(iter(place.values() if isinstance(place, dict) else place), None)
    if choice == "demo" or not isinstance(place, str):
        return choice, choice
    return choice, "/".join(PurePath(place).parts[-2:])
