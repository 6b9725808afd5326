"""Where a training's figures go: metrics.csv always, Weights & Biases unless it is left out."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger

_WANDB_ID = "wandb_id"


def build_loggers(cfg: dict[str, Any], run_dir: Path, log: pd.DataFrame | None) -> list[Logger]:
    """metrics.csv, and what the configuration names besides, told of the whole configuration.

    Args:
        log: rows of metrics.csv that a run that is gone on with begins with.
    """
    loggers: list[Logger] = [_metrics_csv(run_dir, log)]
    if cfg["logger"]:
        is_wandb = cfg["logger"]["_target_"].endswith("WandbLogger")
        logger = instantiate(_wandb_settings(cfg["logger"], run_dir) if is_wandb else cfg["logger"])
        logger.log_hyperparams(cfg)
        if is_wandb and logger.experiment.id:
            (run_dir / _WANDB_ID).write_text(logger.experiment.id)
        loggers.append(logger)
    return loggers


def _wandb_settings(settings: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Those of the configuration, the mode found, tagged by the choices that were made and grouped by sweep."""
    found: dict[str, Any] = {"mode": settings["mode"] or _wandb_mode()}
    if (run_dir / _WANDB_ID).is_file():  # gone on with: W&B goes on with its run too
        found |= {"id": (run_dir / _WANDB_ID).read_text(), "resume": "allow"}
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        found["tags"] = [str(hydra.runtime.choices[group]) for group in ("model", "data")]
        if hydra.mode == RunMode.MULTIRUN:
            found["group"] = Path(hydra.sweep.dir).name
    return {**settings, **found}


def _wandb_mode() -> str:
    """WANDB_MODE where it is set, online where a key is known, else offline."""
    import wandb

    if mode := os.environ.get("WANDB_MODE"):
        return mode  # as it is now: W&B itself reads it once in a process
    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.Error as error:
        warnings.warn(f"W&B cannot be reached, going on offline: {error}", stacklevel=2)
        return "offline"


def finish_wandb(exit_code: int) -> None:
    """End the W&B run, if there is one, or a sweep's next job would write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    kept = Path(wandb.run.settings.sync_dir) if wandb.run.settings._offline else None
    wandb.finish(exit_code=exit_code)
    if kept is not None and kept.is_dir():
        print(f"W&B's run is on this disk; once you are logged in: wandb sync {kept}")


def _metrics_csv(run_dir: Path, log: pd.DataFrame | None) -> CSVLogger:
    logger = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)  # nothing is lost by a kill
    experiment = logger.experiment  # takes away a file that is there
    if log is not None:
        log.to_csv(run_dir / "metrics.csv", index=False)
        experiment.metrics_keys = list(log.columns)
    return logger
