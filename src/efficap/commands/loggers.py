"""Where a training's figures go: metrics.csv always, Weights & Biases unless it is left out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from efficap.commands.init_from import model_name
from efficap.commands.metrics_csv import MetricsLogger
from efficap.commands.provenance import provenance, without_secrets
from efficap.commands.run_dir import CONFIG_FILE, TOKENIZER_DIR
from efficap.commands.sweep import is_sweep_job
from efficap.commands.wandb_logger import GuestWandbLogger
from efficap.errors import InputError
from efficap.files import replacing
from efficap.models.weights import WEIGHTS_FILE
from efficap.ranks import is_first
from efficap.training.progress import METRICS_FILE
from efficap.yaml_files import read_yaml

_WANDB_FILE = "wandb.json"  # in a run directory: which of W&B's runs it is


def build_loggers(cfg: dict[str, Any], run_dir: Path, log: pd.DataFrame | None) -> list[Logger]:
    """metrics.csv, and what the configuration names besides, told of the whole configuration.

    Args:
        log: rows of metrics.csv that a run that is gone on with begins with.
    """
    if not is_first():
        return [CSVLogger(run_dir, name="", version="")]  # of other ranks than the first it writes nothing
    loggers: list[Logger] = [MetricsLogger(run_dir, log)]
    if cfg["logger"]:
        if not isinstance(cfg["logger"].get("_target_"), str):
            raise InputError(
                f"logger={cfg['logger']} names no class with logger._target_; logger=csv takes none"
            )
        told = without_secrets({**cfg, "provenance": provenance()})
        if kind := _wandb_class(cfg["logger"]["_target_"]):
            logger = _wandb_logger(kind, cfg, run_dir)
            run = logger.experiment
            if isinstance(getattr(run, "sweep_id", None), str):  # W&B's agent lets nobody change what it set
                swept = set(run.config.keys())
                told = {f"{key}_settings" if key in swept else key: value for key, value in told.items()}
        else:
            logger = instantiate(cfg["logger"])
            if not isinstance(logger, Logger):
                raise InputError(f"logger._target_={cfg['logger']['_target_']} is no logger of Lightning's")
        logger.log_hyperparams(told)
        loggers.append(logger)
    return loggers


def _wandb_class(target: str) -> type[WandbLogger] | None:
    """The class to build where W&B's logger is named: a guest for Lightning's, or the user's own; None for others."""
    try:
        found = get_object(target)
    except Exception:  # which `instantiate` tells
        return None
    if not (isinstance(found, type) and issubclass(found, WandbLogger)):
        return None
    return GuestWandbLogger if found is WandbLogger else found


def _wandb_logger(kind: type[WandbLogger], cfg: dict[str, Any], run_dir: Path) -> WandbLogger:
    """W&B's, its run begun: offline where it cannot be had online.

    Raises:
        InputError: a setting that the logger, or W&B, does not have.
    """
    import wandb

    # A line of its own log that a full disk has no room for would be a traceback.
    logging.raiseExceptions = False
    ours = ("_target_", "artifact", "mode")
    mode = cfg["logger"].get("mode") or os.environ.get("WANDB_MODE")  # as it is now: W&B reads that once
    settings = {key: value for key, value in cfg["logger"].items() if key not in ours}
    users = {key: settings[key] for key in ("tags", "group") if settings.get(key)}
    settings |= (_wandb_run(run_dir) or _new_wandb_run(cfg, run_dir)) | users
    place = settings.get("save_dir", str(run_dir))
    settings = {"name": None, **without_secrets(settings), "save_dir": place}
    try:
        mode = mode or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        if mode == "online":
            _reach(wandb.setup().settings.base_url)
        logger = _begin(kind, settings, mode)
    except (OSError, wandb.Error) as error:
        if mode not in (None, "online"):  # None: there is a key, and it is none
            raise
        print(f"W&B cannot be used online, going on offline: {str(error).splitlines()[0]}", file=sys.stderr)
        logger = _begin(kind, settings, "offline")
    run = logger.experiment
    if isinstance(run.id, str):
        kept = {"id": run.id, "name": run.name, "group": run.group or None, "tags": list(run.tags or ())}
        with replacing(run_dir / _WANDB_FILE) as file:
            file.write(f"{json.dumps(kept, indent=2)}\n".encode())
    return logger


def _begin(kind: type[WandbLogger], settings: dict[str, Any], mode: str) -> WandbLogger:
    import wandb

    try:
        logger = kind(**settings, mode=mode)
        _ = logger.experiment
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"logger has settings that its class, or W&B, does not take: {reason}") from error
    except wandb.errors.UsageError as error:
        if mode == "online":  # there may be no key
            raise
        raise InputError(f"logger: {error}") from error
    return logger


def _reach(url: str) -> None:
    """Raises OSError where nothing answers at `url`; W&B itself would try for a minute and a half."""
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, too
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except OSError as error:
        raise OSError(f"{url} does not answer: {getattr(error, 'reason', error)}") from error


def _wandb_run(run_dir: Path) -> dict[str, Any]:
    """Which of W&B's runs goes on with a run that is gone on with; empty where it has none."""
    file = run_dir / _WANDB_FILE
    return {**_read_wandb_file(file), "resume": "allow"} if file.is_file() else {}


def _new_wandb_run(cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """What tells the run from others, if the user does not: tags of the choices that were made, and a sweep's group."""
    if not HydraConfig.initialized() or cfg["resume"] not in (None, "auto"):  # whose choices were made before
        return {}
    hydra = HydraConfig.get()
    model, data = (str(hydra.runtime.choices[group]) for group in ("model", "data"))
    if cfg["init_from"]:
        model = model_name(model, cfg["init_from"])
    found: dict[str, Any] = {"tags": [model, data]}
    if is_sweep_job():
        found |= {"group": Path(hydra.sweep.dir).name[:128], "name": run_dir.name}  # W&B takes no longer one
    return found


def _read_wandb_file(file: Path) -> dict[str, Any]:
    """What `_wandb_logger` kept, and nothing else: it becomes arguments of the logger, and may come from anywhere."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        id_, name, group, tags = (found[key] for key in ("id", "name", "group", "tags"))
        if not (isinstance(id_, str) and isinstance(name, str) and isinstance(group, str | None)):
            raise TypeError("id, name and group must be text")
        return {"id": id_, "name": name, "group": group, "tags": [str(tag) for tag in tags]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{file} is damaged ({error!r}); remove it, and W&B begins another run") from error


def log_artifact(settings: dict[str, Any] | None, run_dir: Path) -> None:
    """The run's best weights, tokenizer and settings as W&B's artifact, where the logger's settings ask for it.

    What keeps it from being one is told and no more: the run has all of it.
    """
    wandb = sys.modules.get("wandb")
    if not (settings and settings.get("artifact")) or wandb is None or wandb.run is None:
        return
    try:
        artifact = wandb.Artifact(f"captioner-{wandb.run.id}", type="model")
        with artifact.new_file(CONFIG_FILE) as config:
            yaml.safe_dump(
                without_secrets(read_yaml(run_dir / CONFIG_FILE)), config, sort_keys=False, allow_unicode=True
            )
        for name in (WEIGHTS_FILE, METRICS_FILE):
            artifact.add_file(str(run_dir / name))
        artifact.add_dir(str(run_dir / TOKENIZER_DIR), name=TOKENIZER_DIR)
        wandb.run.log_artifact(artifact, aliases=["best"])
    except Exception as error:  # its process is gone, its staging disk full, or no weights were kept
        print(f"W&B takes no artifact of {run_dir}: {' '.join(str(error).split())}", file=sys.stderr)


def finish_wandb(exit_code: int) -> None:
    """End the W&B run, if there is one, or a sweep's next job would write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    kept, is_sent = Path(wandb.run.settings.sync_dir), not wandb.run.settings._offline
    try:
        wandb.finish(exit_code=exit_code)
    except Exception as error:  # its process is gone, or the network
        print(f"W&B could not end its run: {' '.join(str(error).split())}", file=sys.stderr)
        is_sent = False
        with contextlib.suppress(Exception):
            wandb.teardown()
        wandb.__dict__["run"] = None  # a sweep's next job has a new process of W&B's
    if not is_sent and kept.is_dir():
        print(f"W&B's run is on this disk; once you are logged in: wandb sync {kept}")
