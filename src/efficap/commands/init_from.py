"""A training that starts from a run's weights: what it takes of that run, and what the user may still change."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig

from efficap.commands.run_dir import RunDirectory
from efficap.errors import InputError

# What neither the weights nor the pictures depend on.
_FREE = {"encoder.frozen", "encoder.drop_path_rate", "bridge.dropout", "decoder.dropout"}


def with_model_of(run: RunDirectory, cfg: dict[str, Any]) -> dict[str, Any]:
    """The values of conf/train.yaml with the model of a run that the training starts from.

    All of it is the run's, learning rates too, but for what the command line says: freezing, regularisation and
    learning rates are taken from there, and nothing else may be said that differs.

    Raises:
        InputError: the command line asks for another model.
    """
    theirs, ours = _leaves(run.config["model"]), _leaves(cfg["model"])
    model: dict[str, Any] = dict(theirs)
    for key in filter(_is_said, theirs.keys() & ours.keys()):
        if key in _FREE or key.startswith("lr."):
            model[key] = ours[key]
        elif ours[key] is not None and ours[key] != theirs[key]:  # null is filled by what else is chosen
            raise InputError(
                f"model.{key}={ours[key]} must be {theirs[key]}, as in init_from={cfg['init_from']}; leave model out: "
                "it is that run's"
            )
    lr = {
        part: model[f"lr.{part}"] if value == cfg["model"]["lr"][part] else value  # said, where it differs
        for part, value in cfg["optimizer"]["lr"].items()
    }
    return {
        **cfg,
        "init_from": str(run.path),
        "model": _nested(model),
        "optimizer": {**cfg["optimizer"], "lr": lr},
    }


def _is_said(key: str) -> bool:
    """Whether the command line chose a model, or this setting of it."""
    if not HydraConfig.initialized():
        return False
    said = {override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task}
    parts = f"model.{key}".split(".")
    return any(".".join(parts[: n + 1]) in said for n in range(len(parts)))


def _leaves(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in settings.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in leaves.items():
        *parents, last = key.split(".")
        below = nested
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = value
    return nested
