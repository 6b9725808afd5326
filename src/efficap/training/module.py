"""The training step: model, loss, optimiser and scores joined. No maths of its own.

B images, K captions of each, T tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.callbacks import Timer
from torch import Tensor

from efficap.batch import CaptionBatch
from efficap.decoding import Decoding
from efficap.errors import InputError
from efficap.evaluation.scores import distinct_share, score_captions
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training.augment import STEP, growing_size, resized
from efficap.training.losses import batch_loss
from efficap.training.optim import build_adamw
from efficap.training.writer import CaptionWriter

VALIDATION_METRICS = ("BLEU", "CIDEr")  # METEOR alone takes longer to start than these take


class CaptionModule(pl.LightningModule):
    """Trains a captioner and, in validation, scores the captions that it writes.

    Args:
        captioner: the model.
        tokenizer: decodes what it writes.
        decoding: how it writes in validation.
        optimizer: keyword arguments of `build_adamw`, and ``clip_value``, which each element of a gradient is cut to.
        label_smoothing, token_dropout: of the training loss; the validation loss has none. See `batch_loss`.
        start_size: pixels, from which the pictures grow to their full size; None: they do not. See `growing_size`.
        unfreeze_encoder_at: share of the training, 0 … 1, before which the encoder stays as it is.

    Raises:
        InputError: an option out of its range.
    """

    def __init__(
        self,
        captioner: CaptionModel,
        tokenizer: CaptionTokenizer,
        decoding: Decoding,
        *,
        optimizer: Mapping[str, Any],
        label_smoothing: float,
        token_dropout: float = 0.0,
        start_size: int | None = None,
        unfreeze_encoder_at: float | None = None,
    ) -> None:
        super().__init__()
        check_settings(
            label_smoothing=label_smoothing,
            token_dropout=token_dropout,
            start_size=start_size,
            unfreeze_encoder_at=unfreeze_encoder_at,
        )
        check_unfreezing(unfreeze_encoder_at, frozen=captioner.encoder.frozen)
        self.captioner = captioner
        self.writer = CaptionWriter(captioner, tokenizer, decoding)
        self.optimizer_settings = dict(optimizer)
        # Runs from before it was a setting lack it.
        self.clip_value = self.optimizer_settings.pop("clip_value", None)
        self.label_smoothing, self.token_dropout = label_smoothing, token_dropout
        self.start_size, self.unfreeze_encoder_at = start_size, unfreeze_encoder_at
        self.predictions: dict[str, str] = {}
        self.references: dict[str, list[str]] = {}

    def on_train_batch_start(self, batch: CaptionBatch, _: int) -> None:
        if self.unfreeze_encoder_at is not None:
            self.captioner.encoder.freeze(self.progress(self.global_step) < self.unfreeze_encoder_at)

    def training_step(self, batch: CaptionBatch, _: int) -> Tensor:
        if self.start_size is not None and batch.images.dtype == torch.uint8:
            full = batch.images.shape[-1]
            size = growing_size(min(self.start_size, full), full, self.progress(self.global_step))
            batch = replace(batch, images=resized(batch.images, size))
        loss = batch_loss(
            self.captioner, batch, label_smoothing=self.label_smoothing, token_dropout=self.token_dropout
        )
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def on_validation_epoch_start(self) -> None:
        self.predictions, self.references = {}, {}

    def validation_step(self, batch: CaptionBatch, _: int) -> None:
        loss = batch_loss(self.captioner, batch, label_smoothing=0.0)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(batch.places), sync_dist=True)
        written = self.writer.write(batch.images, batch.image_ids)
        assert batch.references is not None
        captions = (best.text for best, *_ in written)
        self.predictions |= dict(zip(batch.image_ids, captions, strict=True))
        self.references |= dict(zip(batch.image_ids, batch.references, strict=True))

    def on_validation_epoch_end(self) -> None:
        self.predictions, self.references = _gather(self.predictions), _gather(self.references)
        scores = score_captions(self.predictions, self.references, metrics=VALIDATION_METRICS)
        for metric in ("CIDEr", "BLEU-4"):
            value = scores[metric]
            if not isinstance(value, float):
                warnings.warn(f"val/{metric} failed: {scores}", stacklevel=1)
                value = math.nan  # never the best, and training goes on
            self.log(f"val/{metric}", value, prog_bar=True)
        self.log("val/distinct", distinct_share(list(self.predictions.values())))

    def configure_optimizers(self) -> Any:
        optimizer, schedule = build_adamw(
            self.captioner,
            self.progress,
            fused=self.trainer.precision != "16-mixed",  # its loss scaling must come before the clipping
            **self.optimizer_settings,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each element, then the norm, and log that; Lightning refuses a fused optimiser in mixed precision."""
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.captioner.parameters(), self.clip_value)
        if gradient_clip_val:
            norm = torch.nn.utils.clip_grad_norm_(self.captioner.parameters(), gradient_clip_val)
            self.log("train/grad_norm", norm)  # a tensor: no step waits for it

    def progress(self, step: int) -> float:
        """The share of the training that is over: by steps or by the clock, whichever limit is nearer."""
        shares = [step / float(self.trainer.estimated_stepping_batches)]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):
                elapsed, remaining = callback.time_elapsed(), callback.time_remaining()
                if remaining is not None:
                    shares.append(elapsed / (elapsed + remaining))
        return max(shares)


def check_settings(
    *,
    label_smoothing: float,
    token_dropout: float,
    start_size: int | None,
    unfreeze_encoder_at: float | None,
) -> None:
    """Raises InputError where a setting of `CaptionModule` is out of its range."""
    for name, share in (
        ("label_smoothing", label_smoothing),
        ("token_dropout", token_dropout),
        ("unfreeze_encoder_at", unfreeze_encoder_at),
    ):
        if share is not None and not 0 <= share < 1:
            raise InputError(f"training.{name}={share} must be at least 0 and below 1")
    if start_size is not None and start_size < STEP:
        raise InputError(f"training.start_size={start_size} must be at least {STEP} pixels; null: no growing")


def check_unfreezing(unfreeze_encoder_at: float | None, *, frozen: bool) -> None:
    """Raises InputError where an encoder is to learn later that is frozen for good."""
    if unfreeze_encoder_at is not None and frozen:
        raise InputError(
            f"training.unfreeze_encoder_at={unfreeze_encoder_at} must not come with model.encoder.frozen=true, "
            "which freezes it for good; leave out one of the two"
        )


def _gather(mine: dict[str, Any]) -> dict[str, Any]:
    """All processes' entries; a picture that a distributed sampler repeats counts once."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return mine
    parts: list[dict[str, Any]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}
