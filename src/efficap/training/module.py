"""The training step: model, loss, optimiser and scores joined. No maths of its own.

B images, K captions of each, T tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from efficap.batch import CaptionBatch
from efficap.decoding import Decoding
from efficap.errors import InputError
from efficap.evaluation.scores import distinct_share, score_captions
from efficap.models.captioner import CaptionModel
from efficap.ranks import agreed, from_first, summed, to_first
from efficap.tokenizer import CaptionTokenizer
from efficap.training.augment import STEP, growing_size, resized
from efficap.training.losses import batch_loss, memory_loss, shared_loss
from efficap.training.optim import build_optimizer
from efficap.training.sharding import bring_together, shard
from efficap.training.writer import CaptionWriter

VALIDATION_METRICS = ("BLEU", "CIDEr")  # METEOR alone takes longer to start than these take
_HALF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # what products are rounded to


class CaptionModule(pl.LightningModule):
    """Trains a captioner and, in validation, scores the captions that it writes.

    Args:
        captioner: the model.
        tokenizer: decodes what it writes.
        decoding: how it writes in validation.
        optimizer: keyword arguments of `build_optimizer`, and ``clip_value``, to which each element of a gradient is
            cut.
        label_smoothing, token_dropout: of the training loss; the validation loss has none. See `batch_loss`.
        hidden_captions: likewise; two shares are those at the start and at the end of the training.
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
        hidden_captions: float | Sequence[float] = 0.0,
        start_size: int | None = None,
        unfreeze_encoder_at: float | None = None,
    ) -> None:
        super().__init__()
        check_settings(
            label_smoothing=label_smoothing,
            token_dropout=token_dropout,
            hidden_captions=hidden_captions,
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
        self.hidden_captions = as_range(hidden_captions)
        self.start_size, self.unfreeze_encoder_at = start_size, unfreeze_encoder_at
        self.predictions: dict[str, str] = {}
        self.references: dict[str, list[str]] = {}
        self.gradient_norm: Tensor | None = None  # of the step, by who asks before the gradients are clipped
        self._loss = torch.zeros(2)  # of a validation: the sum, and how many tokens

    def configure_model(self) -> None:
        """Called by Lightning; its strategy for shards has told the module between which processes."""
        if self._device_mesh is not None:
            shard(self.captioner, self._device_mesh["data_parallel"])

    def on_train_batch_start(self, batch: CaptionBatch, _: int) -> None:
        if self.unfreeze_encoder_at is not None:
            self.captioner.encoder.freeze(self.progress(self.global_step) < self.unfreeze_encoder_at)

    def training_step(self, batch: CaptionBatch, _: int) -> Tensor:
        if self.start_size is not None and batch.images.dtype == torch.uint8:
            full = batch.images.shape[-1]
            size = growing_size(min(self.start_size, full), full, self.progress(self.global_step))
            batch = replace(batch, images=resized(batch.images, size))
        loss = batch_loss(
            self.captioner,
            batch,
            label_smoothing=self.label_smoothing,
            token_dropout=self.token_dropout,
            hidden_captions=self._hidden_share(),
        )
        loss, shown = shared_loss(loss, len(batch.places))
        self.log("train/loss", shown, prog_bar=True, batch_size=len(batch))
        return loss

    def _hidden_share(self) -> float:
        first, last = self.hidden_captions
        return first if first == last else first + (last - first) * min(1.0, self.progress(self.global_step))

    def on_validation_epoch_start(self) -> None:
        self.predictions, self.references = {}, {}
        self._loss = torch.zeros(2, device=self.device)
        if self._device_mesh is not None:
            bring_together(self.captioner, True)
        if (half := _HALF.get(str(self.trainer.precision))) is not None:
            self.captioner.decoder.keep_head(half)

    def validation_step(self, batch: CaptionBatch, _: int) -> None:
        if self.predictions.keys() >= set(batch.image_ids):
            return  # it stands for one of which nothing could be read
        # (N, D) of each picture, which is encoded once for captions and loss.
        memories: dict[str, Tensor] = {}
        self.writer.on_encoded = lambda ids, memory: memories.update(zip(ids, memory, strict=True))
        if self.writer.batch_size is None:
            self.writer.batch_size = len(batch)  # training takes more for as many pictures
        written = self.writer.write(batch.images, batch.image_ids)
        memory = torch.stack([memories[image_id] for image_id in batch.image_ids])  # (B, N, D)
        read = batch.tokens[..., :-1]
        loss = memory_loss(self.captioner, memory, read, batch.places, batch.targets, label_smoothing=0.0)
        tokens = len(batch.places)
        self._loss += torch.stack([tokens * loss, loss.new_full((), tokens)])
        assert batch.references is not None
        captions = (best.text for best, *_ in written)
        self.predictions |= dict(zip(batch.image_ids, captions, strict=True))
        self.references |= dict(zip(batch.image_ids, batch.references, strict=True))

    def on_validation_epoch_end(self) -> None:
        self.captioner.decoder.drop_head()
        self.writer.on_encoded = None  # it holds the last memories
        if self._device_mesh is not None:
            bring_together(self.captioner, False)
        total, tokens = summed(self._loss)
        self.log("val/loss", total / tokens, prog_bar=True)
        self.predictions = {key: text for part in to_first(self.predictions) for key, text in part.items()}
        self.references = {key: texts for part in to_first(self.references) for key, texts in part.items()}
        for metric, value in from_first(self._scores).items():
            self.log(f"val/{metric}", value, prog_bar=metric != "distinct")

    def _scores(self) -> dict[str, float]:
        found = score_captions(self.predictions, self.references, metrics=VALIDATION_METRICS)
        scores = {}
        for metric in ("CIDEr", "BLEU-4"):
            value = found[metric]
            if not isinstance(value, float):
                warnings.warn(f"val/{metric} failed: {found}", stacklevel=1)
                value = math.nan  # never the best, and training goes on
            scores[metric] = value
        return {**scores, "distinct": distinct_share(list(self.predictions.values()))}

    def configure_optimizers(self) -> Any:
        optimizer, schedule = build_optimizer(
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
        norm, self.gradient_norm = self.gradient_norm, None
        if norm is None or self.clip_value is not None:
            norm = gradient_norm(self.captioner)
        if gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.captioner.parameters(), gradient_clip_val, norm)
        self.log("train/grad_norm", whole(norm))  # a tensor: no step waits for it

    def progress(self, step: int) -> float:
        """The share of the training that is over: by steps or by the clock, whichever limit is nearer."""
        by_steps = step / float(self.trainer.estimated_stepping_batches)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):
                elapsed, remaining = callback.time_elapsed(), callback.time_remaining()
                if remaining is not None:
                    return max(by_steps, agreed(elapsed / (elapsed + remaining)))  # clocks differ
        return by_steps


def gradient_norm(module: nn.Module) -> Tensor:
    """The norm of all gradients together; where these are in shards, a tensor that torch can clip them by."""
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be in shards, come together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_settings(
    *,
    label_smoothing: float,
    token_dropout: float,
    start_size: int | None,
    unfreeze_encoder_at: float | None,
    hidden_captions: float | Sequence[float] = 0.0,
) -> None:
    """Raises InputError where a setting of `CaptionModule` is out of its range."""
    for name, share in (
        ("label_smoothing", label_smoothing),
        ("token_dropout", token_dropout),
        ("unfreeze_encoder_at", unfreeze_encoder_at),
    ):
        if share is not None and not 0 <= share < 1:
            raise InputError(f"training.{name}={share} must be at least 0 and below 1")
    shares = as_range(hidden_captions)
    if not all(0 <= share <= 1 for share in shares) or min(shares) == 1:
        raise InputError(
            f"training.hidden_captions={hidden_captions} must be at least 0 and below 1; or two shares from 0 to 1, at "
            "the start and at the end, one of them below 1"
        )
    if start_size is not None and start_size < STEP:
        raise InputError(f"training.start_size={start_size} must be at least {STEP} pixels; null: no growing")


def as_range(shares: float | Sequence[float]) -> tuple[float, float]:
    """The first and the last of two, or of one that stays."""
    first, last = shares if isinstance(shares, Sequence) else (shares, shares)
    return first, last


def check_unfreezing(unfreeze_encoder_at: float | None, *, frozen: bool) -> None:
    """Raises InputError where an encoder is to learn later that is frozen for good."""
    if unfreeze_encoder_at is not None and frozen:
        raise InputError(
            f"training.unfreeze_encoder_at={unfreeze_encoder_at} must not come with model.encoder.frozen=true, "
            "which freezes it for good; leave out one of the two"
        )
