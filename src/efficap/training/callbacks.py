"""What a training shows and leaves in its run directory: its progress, the best weights, sample captions."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor

from efficap.evaluation.gallery import THUMBNAIL, GalleryItem, load_picture, write_gallery
from efficap.evaluation.pictures import PictureRecord, write_pictures
from efficap.models.weights import save_weights
from efficap.ranks import largest
from efficap.training.module import CaptionModule
from efficap.training.progress import SAMPLES_FILE
from efficap.training.resume_point import others_let_go
from efficap.training.writing import only_warning, or_the_end

SAMPLES = 24  # pictures of a page of samples, always the same ones


class ProgressBar(RichProgressBar):
    """Lightning's bar, its metrics read every log_every_n_steps: each reading waits for the device."""

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        due = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        due = due and not trainer.fit_loop._should_accumulate()  # batches after it belong to the next step
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
        self._is_exported = True  # model.safetensors has the best weights so far

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "is_exported": self._is_exported}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A checkpoint may come from anywhere, and what is best until now is read and, later, removed; the run may have
        # been moved since. So of the path nothing counts but that there is one.
        best = f"{self.dirpath}/best.ckpt" if state_dict["best_model_path"] else ""
        score = state_dict["best_model_score"]
        own = {
            "dirpath": self.dirpath,
            "best_model_path": best,
            "kth_best_model_path": best,
            "last_model_path": "",
        }
        super().load_state_dict({**state_dict, **own, "best_k_models": {best: score} if best else {}})
        self._is_exported = state_dict.get("is_exported", True)  # earlier versions did not say

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
        best, weights = self.best_model_score, None
        if best is None:
            weights = trainer.strategy.lightning_module_state_dict()  # for which shards come together
        if not trainer.is_global_zero:
            return
        with or_the_end("the weights", self.run_dir):
            if weights is not None:
                self._export(weights)
            elif not self._is_exported:  # the disk had no room for them
                self._export_best()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        before, failed = copy.deepcopy(self.state_dict()), False
        best = self.best_model_score
        try:
            with others_let_go(trainer):
                super().on_validation_end(trainer, pl_module)
        except OSError as error:
            warnings.warn(f"the best weights could not be kept, training goes on: {error}", stacklevel=1)
            failed = True
        if largest(failed)[0]:
            self.load_state_dict(before)
        elif self.best_model_score is not best:
            self._is_exported = False
        if not self._is_exported and trainer.is_global_zero:
            with only_warning("the best weights"):
                self._export_best()

    def _export_best(self) -> None:
        checkpoint = torch.load(self.best_model_path, map_location="cpu", weights_only=True, mmap=True)
        self._export(checkpoint["state_dict"])
        self._is_exported = True

    def _export(self, weights: dict[str, Tensor]) -> None:
        save_weights({key.removeprefix("captioner."): value for key, value in weights.items()}, self.run_dir)


class SampleCaptions(Callback):
    """After each validation a page of pictures, captions and references; in W&B a table of the same.

    The captions of the last one are also kept as `SAMPLES_FILE`, for programs to read.

    Args:
        run_dir: pages go to its folder ``samples``.
        pictures: gives the picture of an image id.
        first_step: steps of the stages before.
    """

    def __init__(
        self,
        run_dir: Path,
        pictures: Callable[[str], Path | Image.Image],
        *,
        first_step: int,
    ) -> None:
        self.run_dir, self.pictures, self.first_step = run_dir, pictures, first_step

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CaptionModule)
        stride = max(1, len(pl_module.predictions) // SAMPLES)
        chosen = list(itertools.islice(pl_module.predictions, 0, stride * SAMPLES, stride))
        cider, step = float(trainer.callback_metrics["val/CIDEr"]), self.first_step + trainer.global_step
        with only_warning("sample captions"):
            items = [
                GalleryItem(
                    self.pictures(image_id), pl_module.predictions[image_id], pl_module.references[image_id]
                )
                for image_id in chosen
            ]
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


def _log_table(logger: WandbLogger, items: list[GalleryItem]) -> None:
    rows = [
        [
            _small(item.image),
            item.caption,
            "\n".join(item.references),
        ]
        for item in items
    ]
    logger.log_table("val/samples", columns=["image", "caption", "references"], data=rows)


def _small(image: Path | Image.Image) -> Any:
    """A picture for W&B without what its file tells besides, such as where it was taken; None: it cannot be read."""
    import wandb

    try:
        return wandb.Image(load_picture(image, THUMBNAIL))
    except OSError:
        return None
