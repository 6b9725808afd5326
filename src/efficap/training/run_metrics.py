"""metrics.json and curves.png: how far a training is, how fast, and what its validations gave."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from efficap.batch import CaptionBatch
from efficap.evaluation.report import plot_curves
from efficap.files import replacing
from efficap.ranks import summed
from efficap.training.module import CaptionModule
from efficap.training.progress import METRICS_FILE, metrics_of
from efficap.training.stage import Stage
from efficap.training.trainer_data import TrainerData
from efficap.training.writing import only_warning, or_the_end

CURVES_SECONDS = 30.0  # at least, between two drawings of curves.png but the last: each takes half a second


class RunMetrics(Callback):
    """Counts pairs of all processes, their rate and steps left out, and keeps metrics.json and curves.png up to date.

    The rate is of training alone: validations are not counted in its time. Where validations follow each other
    quickly, not each of them draws the curves anew; the end of the training does.

    Args:
        run_dir: the run directory.
        stage: of the training.
        before: of the stage before this one, whose counts go on.
    """

    def __init__(self, run_dir: Path, stage: Stage, before: RunMetrics | None = None) -> None:
        self.run_dir, self.stage = run_dir, stage
        self.pairs: Tensor | None = None  # on the device: reading it at every step would wait for the step
        self.bad_steps = torch.zeros((), dtype=torch.int64)  # on the device, too
        self.seconds = 0.0
        self.history: list[dict[str, float | None]] = []
        self._at_end: dict[str, Any] | None = None  # what metrics.json said at the end of training
        self._resumed_at: float | None = None  # when the clock was started; None: it stands
        self._drawn_at = 0.0
        if before is not None:
            self.load_state_dict(before.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "pairs": int(self.pairs or 0),
            "bad_steps": int(self.bad_steps),
            "seconds": self._seconds(),
            "history": self.history,
            "stage": asdict(self.stage),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pairs = torch.tensor(state_dict["pairs"])
        self.bad_steps = torch.tensor(state_dict.get("bad_steps", 0))  # from before they were counted
        self.seconds, self.history = state_dict["seconds"], list(state_dict["history"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resumed_at = self._drawn_at = time.monotonic()
        before = metrics_of(self.run_dir)
        if before.get("finished") and trainer.is_global_zero:  # and is gone on with beyond its end
            with only_warning("metrics.json"):
                self._replace({**before, "finished": False})

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: CaptionBatch,
        batch_idx: int,
    ) -> None:
        pairs = summed((batch.lengths > 0).sum())
        self.pairs = pairs if self.pairs is None else self.pairs.to(pairs.device) + pairs
        due = self._steps(trainer) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        # Not with each of the batches that the next step adds up.
        if due and not trainer.fit_loop._should_accumulate():
            pl_module.log("train/pairs_per_second", self._rate())
            pl_module.log("train/pairs", self.pairs.float())  # so far: what learning curves are compared over
            pl_module.log("train/bad_steps", self.bad_steps.float())
            pl_module.log("train/memory_gib", _peak_memory(pl_module.device) / 2**30)
            assert isinstance(pl_module, CaptionModule)
            pl_module.log("train/progress", pl_module.progress(trainer.global_step))

    def count_bad_steps(self, count: Tensor) -> None:
        """Add steps that were left out; `BadSteps` tells of them."""
        self.bad_steps = self.bad_steps.to(count.device) + count

    def _steps(self, trainer: pl.Trainer) -> int:
        return self.stage.steps + int(trainer.global_step)

    def _rate(self) -> float:
        return int(self.pairs or 0) / max(self._seconds(), 1e-9)

    def _seconds(self) -> float:
        """Of training, without its validations."""
        if self._resumed_at is not None:
            now = time.monotonic()
            self.seconds, self._resumed_at = self.seconds + now - self._resumed_at, now
        return self.seconds

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        self._seconds()
        self._resumed_at = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resumed_at = time.monotonic()
        if not trainer.is_global_zero:
            return
        entry: dict[str, float | None] = {"step": self._steps(trainer)}
        for key, value in trainer.callback_metrics.items():
            if key.startswith("val/"):
                entry[key] = float(value) if math.isfinite(value) else None  # JSON has no NaN
        self.history.append(entry)
        with only_warning("metrics.json"):
            self._write(trainer, draw=time.monotonic() - self._drawn_at >= CURVES_SECONDS)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_clock()
        if trainer.is_global_zero:
            with or_the_end("metrics.json", self.run_dir):
                self._at_end = self._write(trainer, draw=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._at_end is not None and self.stage.is_last:  # and the weights have been written, too
            with or_the_end("metrics.json", self.run_dir):
                self._replace({**self._at_end, "finished": True})

    def _write(self, trainer: pl.Trainer, *, draw: bool) -> dict[str, Any]:
        for logger in trainer.loggers:
            logger.save()
        if draw:
            with only_warning("curves.png"):
                plot_curves(self.run_dir / "metrics.csv", self.run_dir / "curves.png")
            self._drawn_at = time.monotonic()
        parameters = list(trainer.lightning_module.parameters())
        its_data = trainer.datamodule  # type: ignore[attr-defined]
        # Scores of other stages are of other data, and of weights that this one has gone on from.
        history = [entry for entry in self.history if (entry["step"] or 0) > self.stage.steps]
        metrics = {
            "finished": False,
            "stage": self.stage.name,
            "steps": self._steps(trainer),
            "epochs": self.stage.epochs + trainer.current_epoch,
            "pairs": int(self.pairs or 0),
            "bad_steps": int(self.bad_steps),
            "pairs_per_second": int(self.pairs or 0) / max(self.seconds, 1e-9),
            "training_seconds": self.seconds,
            "left_out": its_data.data.left_out() if isinstance(its_data, TrainerData) else {},
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "best": max(reversed(history), key=lambda entry: entry.get("val/CIDEr") or 0.0, default=None),
            "last": history[-1] if history else None,
        }
        self._replace(metrics)
        return metrics

    def _replace(self, metrics: dict[str, Any]) -> None:
        with replacing(self.run_dir / METRICS_FILE) as file:
            file.write((json.dumps(metrics, indent=2) + "\n").encode())


def _peak_memory(device: torch.device) -> int:
    """The most bytes so far: of the GPU's tensors, or, elsewhere, of this process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
