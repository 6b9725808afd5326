"""Where a training's figures go: metrics.csv always, Weights & Biases unless it is left out."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.utils import instantiate
from lightning.pytorch.loggers import CSVLogger, Logger


def build_loggers(cfg: dict[str, Any], run_dir: Path, log: pd.DataFrame | None) -> list[Logger]:
    """metrics.csv, and what the configuration names besides, told of the whole configuration.

    Args:
        log: rows of metrics.csv that a run that is gone on with begins with.
    """
    loggers: list[Logger] = [_metrics_csv(run_dir, log)]
    if cfg["logger"]:
        settings = dict(cfg["logger"])
        if settings["_target_"].endswith("WandbLogger") and settings.get("mode") is None:
            settings["mode"] = _wandb_mode()
        logger = instantiate(settings)
        logger.log_hyperparams(cfg)
        loggers.append(logger)
    return loggers


def _wandb_mode() -> str | None:
    """W&B's own choice where WANDB_MODE makes one, online where a key is known, else offline."""
    import wandb

    if "WANDB_MODE" in os.environ:
        return None
    try:
        return "online" if wandb.login(prompt=False) else "offline"
    except wandb.Error as error:
        warnings.warn(f"W&B cannot be reached, going on offline: {error}", stacklevel=2)
        return "offline"


def finish_wandb(exit_code: int) -> None:
    """End the W&B run, if there is one, or a sweep's next job would write into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        wandb.finish(exit_code=exit_code)


def _metrics_csv(run_dir: Path, log: pd.DataFrame | None) -> CSVLogger:
    logger = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)  # nothing is lost by a kill
    experiment = logger.experiment  # takes away a file that is there
    if log is not None:
        log.to_csv(run_dir / "metrics.csv", index=False)
        experiment.metrics_keys = list(log.columns)
    return logger
