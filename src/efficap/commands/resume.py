"""Going on with a training that was stopped: its settings, its checkpoint, and its log up to there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from efficap.commands.run_dir import CONFIG_FILE, RunDirectory
from efficap.commands.said import OVERRIDES, said_settings
from efficap.commands.saved_parts import check_saved_parts
from efficap.commands.stages import is_of_stages, stages_of
from efficap.commands.sweep import is_sweep_job
from efficap.errors import InputError
from efficap.models.weights import WEIGHTS_FILE
from efficap.training.checkpoints import LAST, PREVIOUS, Checkpoint, checkpoint_of
from efficap.training.progress import METRICS_FILE, is_finished

# What the next step does not depend on, or what says when training ends.
_MAY_CHANGE = ("resume", "trainer.", "checkpoint.", "logger", "callbacks.", "gradient_checkpointing")
# The same of each data set and each stage; the runs of earlier versions lack some.
_OF_DATA = ("num_workers", "read_timeout", "max_bad_fraction", "feature_cache_dir")
_OF_SOME_DATA = {"image_dir", "index_dir", "num_threads"}  # where a data set has them
_OF_STAGE = ("training.max_bad_steps",)
# What tells a training from itself when it is started again; and what changes nothing that is learned. Pictures that
# lie elsewhere may be others, such as the same in another size.
_NOT_COMPARED = {"resume", "output_dir", OVERRIDES, "gradient_checkpointing", "max_bad_steps", *_OF_DATA}
_NOT_COMPARED |= _OF_SOME_DATA - {"image_dir"}


def named_run(cfg: dict[str, Any]) -> RunDirectory | None:
    """The run that ``resume=RUN`` names.

    Raises:
        InputError: no such run, or nothing in it to go on from.
    """
    if cfg["resume"] in (None, "auto"):
        return None
    run = RunDirectory(cfg["resume"], "resume")
    checkpoint_of(run.path)
    return run


def same_run(cfg: dict[str, Any]) -> RunDirectory | None:
    """The run of these very settings that ``resume=auto`` goes on with, or that a sweep finds in the job's folder.

    Args:
        cfg: the resolved values of conf/train.yaml.

    Raises:
        InputError: a sweep's folder holds another training.
    """
    own, said = Path(cfg["output_dir"]).absolute(), said_settings(cfg)
    in_sweep = cfg["resume"] is None and is_sweep_job()
    if in_sweep:
        folders = [own] if (own / CONFIG_FILE).is_file() else []
    else:
        found = own.parent.glob(f"*/{CONFIG_FILE}") if cfg["resume"] == "auto" else []
        folders = sorted((file.parent for file in found), reverse=True)
    alike: list[RunDirectory] = []
    for folder in folders:
        if not ((folder / METRICS_FILE).is_file() or has_checkpoint(folder)):
            continue
        try:
            run = RunDirectory(folder, "resume")
        except InputError:
            if in_sweep:
                raise
            continue  # another program's, where hydra.run.dir puts runs among them
        if not (is_finished(run.path) or has_checkpoint(run.path)):
            continue
        if _compared(run.config, said) == _compared(cfg, said):
            alike.append(run)
        elif in_sweep:
            raise InputError(
                f"{own} holds a training of other settings; hydra.sweep.dir=DIR gives this sweep a folder of its own"
            )
    own_precision = cfg["trainer"]["precision"]
    return min(alike, key=lambda run: run.config["trainer"].get("precision") != own_precision, default=None)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether there is something to go on from."""
    return any((run_dir / "checkpoints" / name).is_file() for name in (LAST, PREVIOUS))


def _compared(config: dict[str, Any], said: Collection[str]) -> str:
    """What tells a training from others; a precision that the command does not name (`said`) may be any."""
    left_out = _NOT_COMPARED if "trainer.precision" in said else _NOT_COMPARED | {"precision"}
    settings = {**config, "stages": list((config.get("stages") or {}).items())}  # in their order
    placeless = _placeless(settings, left_out, str(config["output_dir"]))  # loggers have it too
    return json.dumps(placeless, sort_keys=True)


def _placeless(settings: Any, left_out: Collection[str], folder: str) -> Any:
    """The settings without some, wherever they stand, and without the path of a folder in any of their texts."""
    if isinstance(settings, dict):
        return {
            key: _placeless(value, left_out, folder) for key, value in settings.items() if key not in left_out
        }
    if isinstance(settings, list | tuple):
        return [_placeless(value, left_out, folder) for value in settings]
    return settings.replace(folder, "") if isinstance(settings, str) else settings


def check_new(run_dir: Path) -> None:
    """Raises InputError where a training that begins would mix with what another one left in its folder."""
    if has_checkpoint(run_dir) or (run_dir / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{run_dir} holds another training; resume={run_dir} goes on with it, and this one needs a folder of its "
            "own: hydra.run.dir=DIR, or output_dir=DIR in a program"
        )


def leave_no_trace(folder: Path) -> None:
    """Take away the folder that Hydra made for a new run, where another one is gone on with."""
    if folder.is_dir() and {child.name for child in folder.iterdir()} <= {".hydra"}:
        shutil.rmtree(folder)


def with_settings_of(run: RunDirectory, cfg: dict[str, Any]) -> dict[str, Any]:
    """The run's own settings, with those that were said beside ``resume=RUN`` and that may change.

    Raises:
        InputError: one was said that may not, or the run would build what is not known here
            (`check_saved_parts`).
    """
    settings = {**cfg, **run.config, "resume": str(run.path), "output_dir": str(run.path)}
    said = said_settings(cfg)
    if cfg["resume"] not in (None, "auto"):
        settings |= _said_beside(run, cfg, said)
        check_saved_parts(settings, said, str(run.path / CONFIG_FILE))
    else:  # all that is compared is the same
        for key in ("gradient_checkpointing", *_of_parts(run.config)):
            if key in said or re.sub(r"^stages\.[^.]+\.", "", key) in said:
                settings = _changed(settings, cfg, key.split("."))
    if settings["stages"]:  # the last one's are the run's own
        *_, settings = stages_of(settings).values()
    if isinstance(settings["logger"], dict):
        settings["logger"] = _at_home(settings["logger"], run, cfg, said)
    return settings


def _said_beside(run: RunDirectory, cfg: dict[str, Any], said: Mapping[str, str]) -> dict[str, Any]:
    """Of the run's settings, by their first names, those that what was said changes."""
    changed: dict[str, Any] = {}
    own, of_parts = {**cfg, **run.config}, _of_parts(run.config)
    for key, override in said.items():
        if key.endswith("._target_") and _at(run.config, key) == _at(cfg, key) is not None:
            continue  # said once more, for a run's own code is not imported
        is_of_all = key.startswith(_MAY_CHANGE) and not (own["stages"] and is_of_stages(key))
        if not is_of_all and key not in of_parts:
            raise InputError(
                f"{override}: resume={cfg['resume']} goes on with that run's own settings; leave it out, or start anew "
                f"with init_from={cfg['resume']}{_instead(override, run, cfg)}"
            )
        group, _, rest = key.partition(".")
        if rest:
            changed[group] = _changed(changed.get(group, own[group]), cfg[group], rest.split("."))
        elif group != "resume":
            changed[group] = cfg[group]
    return changed


def _instead(override: str, run: RunDirectory, cfg: dict[str, Any]) -> str:
    """What says the same of a run's parts, one by one, as a word that is refused."""
    key, _, value = override.lstrip("+").partition("=")
    name = key.rpartition(".")[2]
    parts = [f"++{part}={value}" for part in _of_parts(run.config) if part.endswith(f".{name}")]
    if key == "trainer":  # its options differ in these
        chosen = [(f"trainer.{name}", cfg["trainer"][name]) for name in ("accelerator", "strategy")]
        parts = [f"{part}={value or 'null'}" for part, value in chosen if value != _at(run.config, part)]
    return f"; here it is {', '.join(parts)}" if parts else ""


def _at_home(
    logger: dict[str, Any], run: RunDirectory, cfg: dict[str, Any], said: Collection[str]
) -> dict[str, Any]:
    """A logger's settings at the run's own place and name, in place of a new run's or of one that was moved since.

    Another place is the user's, if the command names it; where a saved configuration alone does, nothing is written.
    """
    folders, names = (run.config["output_dir"], cfg["output_dir"]), (run.config["name"], cfg["name"])
    is_users = cfg["resume"] in (None, "auto") or not {"logger", "logger.save_dir"}.isdisjoint(said)
    own = {}
    if "save_dir" in logger and (not is_users or logger["save_dir"] in folders):
        own["save_dir"] = str(run.path)
    if logger.get("name") in names:
        own["name"] = run.config["name"]
    return {**logger, **own}


def _of_parts(config: dict[str, Any]) -> list[str]:
    """The settings of each data set and each stage that may change."""
    stages = {f"stages.{name}.": stage for name, stage in (config.get("stages") or {}).items()}
    keys: list[str] = []
    for where, stage in (stages or {"": config}).items():
        sources = {f"sources.{name}.": source for name, source in stage["data"].get("sources", {}).items()}
        for source, data in (sources or {"": stage["data"]}).items():
            names = [*_OF_DATA, *sorted(_OF_SOME_DATA & data.keys())]
            keys += [f"{where}data.{source}{name}" for name in names]
        keys += [f"{where}{name}" for name in _OF_STAGE]
        keys += [f"{where}trainer.{name}" for name in stage.get("trainer", {}) if where]
    return keys


def _at(settings: Any, key: str) -> Any:
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def _changed(settings: Any, cfg: Any, path: list[str]) -> Any:
    if not path:
        return cfg
    own = settings if isinstance(settings, dict) else {}  # the run may have had nothing there
    return {**own, path[0]: _changed(own.get(path[0]), cfg[path[0]], path[1:])}


def check_limits(checkpoint: Checkpoint, trainer: dict[str, Any]) -> None:
    """Raises InputError where the limits of a stage's trainer leave nothing to do after a checkpoint."""
    more = 0 if checkpoint.validation_due else 1
    for limit, least in (("max_epochs", checkpoint.epoch + 1), ("max_steps", checkpoint.global_step + more)):
        if trainer[limit] != -1 and trainer[limit] < least:
            raise InputError(
                f"trainer.{limit}={trainer[limit]} must be at least {least}, as the training has come that far; leave "
                "it out, or start anew"
            )


def log_until(run: RunDirectory, checkpoint: Checkpoint) -> pd.DataFrame | None:
    """The rows of a run's metrics.csv up to its checkpoint; None where there is no log."""
    log = run.path / "metrics.csv"
    if not log.is_file():
        return None
    table, steps = pd.read_csv(log), checkpoint.stage.steps + checkpoint.global_step
    kept = table["step"] < steps
    if checkpoint.validation_due:  # it will be there again
        scored = [column for column in table.columns if str(column).startswith("val/")]
        kept &= ~((table["step"] == steps - 1) & table[scored].notna().any(axis=1))
    return table[kept]
