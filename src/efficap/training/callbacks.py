"""What a training leaves in its run directory: the best weights, metrics.json, curves and sample captions."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from efficap.batch import CaptionBatch
from efficap.data.module import CaptionData
from efficap.errors import InputError
from efficap.evaluation.pictures import PictureRecord, write_pictures
from efficap.evaluation.report import GalleryItem, plot_curves, write_gallery
from efficap.evaluation.results import replacing
from efficap.models.weights import save_weights
from efficap.ranks import largest, summed
from efficap.training.checkpoints import others_let_go
from efficap.training.module import CaptionModule
from efficap.training.progress import METRICS_FILE, SAMPLES_FILE
from efficap.training.stage import Stage


class ProgressBar(RichProgressBar):
    """Lightning's bar, its metrics read every log_every_n_steps: each reading waits for the device."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if due or trainer.validating or not hasattr(self, "_shown"):
            self._shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
            self._shown.pop("v_num", None)
        return self._shown


class BestCheckpoint(ModelCheckpoint):
    """Lightning's checkpoint of the best val/CIDEr, and its weights alone as model.safetensors.

    The weights are taken from the checkpoint, since that holds the averaged ones where there is an average. The
    last step is validated whatever the interval, unless check_val_every_n_epoch leaves out its epoch; where there
    was no validation at all, the last weights are kept.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(
            dirpath=run_dir / "checkpoints",
            filename="best",
            monitor="val/CIDEr",
            mode="max",
            save_on_train_epoch_end=False,  # right after each validation
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        self.run_dir = run_dir
        self._exported: Tensor | None = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint may come from anywhere, and what is best until now is read and, later, removed.
        files = {
            name: state_dict.get(name)
            for name in ("best_model_path", "last_model_path", "kth_best_model_path")
        }
        kept = {name: str(file) if self._is_own(file) else "" for name, file in files.items()}
        best_k = {file: score for file, score in state_dict["best_k_models"].items() if self._is_own(file)}
        super().load_state_dict({**state_dict, **kept, "best_k_models": best_k})
        self._exported = self.best_model_score  # model.safetensors has them already

    def _is_own(self, file: Any) -> bool:
        return isinstance(file, str) and Path(os.path.normpath(file)).parent == Path(str(self.dirpath))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_batch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last_batch or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates, whatever the interval
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def check_monitor_top_k(self, trainer: pl.Trainer, current: Tensor | None = None) -> bool:
        """Of equal scores the later one is kept: a short training has a CIDEr of 0 for long."""
        return super().check_monitor_top_k(trainer, current) or bool(current == self.best_model_score)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        best = self.best_model_score
        weights = (
            trainer.strategy.lightning_module_state_dict() if best is None else None
        )  # shards come together
        if not trainer.is_global_zero:
            return
        with _or_the_end("the weights", self.run_dir):
            if weights is not None:
                self._export(weights)
            elif best is not self._exported:  # the disk had no room for them
                self._export_best()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before, failed = copy.deepcopy(self.state_dict()), False
        try:
            with others_let_go(trainer):
                super().on_validation_end(trainer, pl_module)
        except OSError as error:
            warnings.warn(f"the best weights could not be kept, training goes on: {error}", stacklevel=1)
            failed = True
        if largest(failed)[0]:
            self.load_state_dict(before)
        if self.best_model_score is self._exported:
            return
        if trainer.is_global_zero:
            with _only_warning("the best weights"):
                self._export_best()

    def _export_best(self) -> None:
        checkpoint = torch.load(self.best_model_path, map_location="cpu", weights_only=True, mmap=True)
        self._export(checkpoint["state_dict"])
        self._exported = self.best_model_score

    def _export(self, weights: dict[str, Tensor]) -> None:
        save_weights({key.removeprefix("captioner."): value for key, value in weights.items()}, self.run_dir)


class RunMetrics(Callback):
    """Counts pairs of all processes, their rate and steps left out, and keeps metrics.json and curves.png up to date.

    The rate is of training alone: validations are not counted in its time.

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
        self.finished = False
        self._resumed_at = 0.0
        if before is not None:
            self.load_state_dict(before.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {
            "pairs": int(self.pairs or 0),
            "bad_steps": int(self.bad_steps),
            "seconds": self.seconds,
            "history": self.history,
            "stage": asdict(self.stage),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.pairs = torch.tensor(state_dict["pairs"])
        self.bad_steps = torch.tensor(state_dict.get("bad_steps", 0))  # from before they were counted
        self.seconds, self.history = state_dict["seconds"], list(state_dict["history"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resumed_at = time.monotonic()

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
        if self._steps(trainer) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/pairs_per_second", self._rate())
            pl_module.log("train/pairs", self.pairs.float())  # so far: what learning curves are compared over
            pl_module.log("train/bad_steps", self.bad_steps.float())
            pl_module.log("train/memory_gib", _peak_memory() / 2**30)
            assert isinstance(pl_module, CaptionModule)
            pl_module.log("train/progress", pl_module.progress(trainer.global_step))

    def count_bad_steps(self, count: Tensor) -> None:
        """Add steps that were left out; `BadSteps` tells of them."""
        self.bad_steps = self.bad_steps.to(count.device) + count

    def _steps(self, trainer: pl.Trainer) -> int:
        return self.stage.steps + int(trainer.global_step)

    def _rate(self) -> float:
        now = time.monotonic()
        self.seconds, self._resumed_at = self.seconds + now - self._resumed_at, now
        return int(self.pairs or 0) / max(self.seconds, 1e-9)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._rate()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        entry: dict[str, float | None] = {"step": self._steps(trainer)}
        for key, value in trainer.callback_metrics.items():
            if key.startswith("val/"):
                entry[key] = float(value) if math.isfinite(value) else None  # JSON has no NaN
        self.history.append(entry)
        self._resumed_at = time.monotonic()
        with _only_warning("metrics.json"):
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self._rate()
            self.finished = self.stage.is_last
            with _or_the_end("metrics.json", self.run_dir):
                self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            logger.save()
        with _only_warning("curves.png"):
            plot_curves(self.run_dir / "metrics.csv", self.run_dir / "curves.png")
        parameters = list(trainer.lightning_module.parameters())
        data = trainer.datamodule  # type: ignore[attr-defined]
        # Scores of other stages are of other data, and of weights that this one has gone on from.
        history = [entry for entry in self.history if (entry["step"] or 0) > self.stage.steps]
        metrics = {
            "finished": self.finished,
            "stage": self.stage.name,
            "steps": self._steps(trainer),
            "epochs": self.stage.epochs + trainer.current_epoch,
            "pairs": int(self.pairs or 0),
            "bad_steps": int(self.bad_steps),
            "pairs_per_second": int(self.pairs or 0) / max(self.seconds, 1e-9),
            "training_seconds": self.seconds,
            "left_out": data.left_out() if isinstance(data, CaptionData) else {},
            "parameters": sum(p.numel() for p in parameters),
            "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "best": max(reversed(history), key=lambda entry: entry.get("val/CIDEr") or 0.0, default=None),
            "last": history[-1] if history else None,
        }
        with replacing(self.run_dir / METRICS_FILE) as file:
            file.write((json.dumps(metrics, indent=2) + "\n").encode())


def _peak_memory() -> int:
    """The most bytes so far: of the GPU's tensors, or, without one, of this process in main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class SampleCaptions(Callback):
    """After each validation a page of pictures, captions and references; in W&B a table of the same.

    The captions of the last one are also kept as `SAMPLES_FILE`, for programs to read.

    Args:
        run_dir: pages go to its folder ``samples``.
        pictures: gives the picture of an image id.
        first_step: steps of the stages before.
        count: pictures a page, always the same ones.
    """

    def __init__(
        self,
        run_dir: Path,
        pictures: Callable[[str], Path | Image.Image],
        *,
        first_step: int,
        count: int = 24,
    ) -> None:
        self.run_dir, self.pictures, self.first_step, self.count = run_dir, pictures, first_step, count

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self.count < 1:
            return
        assert isinstance(pl_module, CaptionModule)
        stride = max(1, len(pl_module.predictions) // self.count)
        chosen = list(itertools.islice(pl_module.predictions, 0, stride * self.count, stride))
        items = [
            GalleryItem(
                self.pictures(image_id), pl_module.predictions[image_id], pl_module.references[image_id]
            )
            for image_id in chosen
        ]
        cider, step = float(trainer.callback_metrics["val/CIDEr"]), self.first_step + trainer.global_step
        with _only_warning("sample captions"):
            write_gallery(
                self.run_dir / "samples" / f"step_{step:07d}.html",
                items,
                title=f"Step {step}",
                subtitle=f"val/CIDEr {cider:.3f}",
            )
            records = [PictureRecord(i, pl_module.predictions[i], pl_module.references[i]) for i in chosen]
            write_pictures(self.run_dir / SAMPLES_FILE, records)
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    _log_table(logger, items)


@contextlib.contextmanager
def _only_warning(what: str) -> Iterator[None]:
    """What is there to look at, or is written again after the next validation, must not end a training."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"{what} could not be written, training goes on: {error}", stacklevel=3)


@contextlib.contextmanager
def _or_the_end(what: str, run_dir: Path) -> Iterator[None]:
    """Raises InputError where there is no later time to write something."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{what} could not be written at the end: {error}; make room, and python train.py resume={run_dir} goes on "
            "from the last checkpoint"
        ) from error


def _log_table(logger: WandbLogger, items: list[GalleryItem]) -> None:
    import wandb

    rows = [
        [
            wandb.Image(str(item.image) if isinstance(item.image, Path) else item.image),
            item.caption,
            "\n".join(item.references),
        ]
        for item in items
    ]
    logger.log_table("val/samples", columns=["image", "caption", "references"], data=rows)
