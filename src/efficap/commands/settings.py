"""The settings of a training, with all that they leave to other things: a run to start from or go on with, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficap.commands.init_from import with_model_of
from efficap.commands.resume import named_run, same_run, with_settings_of
from efficap.commands.run_dir import LATEST, RunDirectory
from efficap.commands.said import OVERRIDES
from efficap.commands.stages import with_whole_stages
from efficap.commands.sweep import is_sweep_job
from efficap.errors import InputError
from efficap.models.build import resolve_model

_PATHS = {
    "table",
    "image_dir",
    "root",
    "quarantine",
    "shards",
    "val_shards",
    "test_shards",
    "index_dir",
    "feature_cache_dir",
}


def resolved_settings(cfg: dict[str, Any]) -> tuple[dict[str, Any], RunDirectory | None, RunDirectory | None]:
    """The settings with all that they leave to other things, the run to start from, and the run to go on with."""
    resumed = named_run(cfg)
    if resumed:
        cfg = _with_absolute_paths(with_settings_of(resumed, cfg))
    init_from = None
    if not resumed:
        init_from = _start(cfg) if cfg["init_from"] is not None else None
        cfg = with_model_of(init_from, cfg) if init_from else {**cfg, "model": resolve_model(cfg["model"])}
        cfg = _with_absolute_paths(with_whole_stages(cfg))
        resumed = same_run(cfg)
        cfg = with_settings_of(resumed, cfg) if resumed else cfg
    return {key: value for key, value in cfg.items() if key != OVERRIDES}, init_from, resumed


def _start(cfg: dict[str, Any]) -> RunDirectory:
    """The run to start from.

    Raises:
        InputError: no such run, or a link to the latest of all where each job, or the training itself, moves that.
    """
    run = RunDirectory(cfg["init_from"], "init_from")
    link = Path(cfg["init_from"]).expanduser()
    if link.name == LATEST and link.is_symlink() and (is_sweep_job() or cfg["resume"] == "auto"):
        why = (
            "the jobs of a sweep would start from each other"
            if is_sweep_job()
            else "resume=auto would look for another"
        )
        raise InputError(
            f"init_from={link} leads to the latest run, and {why}; give the run itself: init_from={run.path}"
        )
    return run


def _with_absolute_paths(cfg: dict[str, Any]) -> dict[str, Any]:
    """The settings as the run directory keeps them, so that it evaluates from any folder."""
    stages = cfg["stages"] or {}
    absolute = {name: {**stage, "data": _absolute_data(stage["data"])} for name, stage in stages.items()}
    return {**cfg, "data": _absolute_data(cfg["data"]), "stages": absolute or None}


def _absolute_data(data: Any) -> Any:
    if not isinstance(data, dict):  # `check_data` tells
        return data
    data = {key: _absolute(value) if key in _PATHS else value for key, value in data.items()}
    if isinstance(data.get("sources"), dict):
        data["sources"] = {name: _absolute_data(source) for name, source in data["sources"].items()}
    return data


def _absolute(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(below) for key, below in value.items()}
    if isinstance(value, list):
        return [_absolute(below) for below in value]
    return str(Path(value).expanduser().absolute()) if isinstance(value, str) else value
