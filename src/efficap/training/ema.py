"""An exponential moving average of the weights, validated and kept in place of them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from efficap.errors import InputError


class ExponentialMovingAverage(WeightAveraging):
    """Lightning's weight averaging with a decay that warms up, so that early weights are soon forgotten.

    After n averaged steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage.

    Args:
        decay: 0 … 1, the share of the average that each step keeps.

    Raises:
        InputError: a decay outside 0 … 1.
    """

    def __init__(self, decay: float) -> None:
        check_decay(decay)
        super().__init__()
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the model itself is moved there only later
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            # torch's own way reads the count of averaged steps, and would wait for the device at each step.
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()
            self._average_model.update_parameters = self._update  # type: ignore[method-assign]

    @torch.no_grad()
    def _update(self, model: nn.Module) -> None:
        assert self._average_model is not None
        n = int(self._average_model.n_averaged)
        share = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0  # of the weights of now
        averaged = [*self._average_model.module.parameters(), *self._average_model.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        moving = [pair for pair in zip(averaged, current, strict=True) if pair[0].is_floating_point()]
        counts = [pair for pair in zip(averaged, current, strict=True) if not pair[0].is_floating_point()]
        torch._foreach_lerp_([pair[0] for pair in moving], [pair[1] for pair in moving], share)
        if counts:  # of BatchNorm's batches
            torch._foreach_copy_([pair[0] for pair in counts], [pair[1] for pair in counts])
        self._average_model.n_averaged += 1


def check_decay(decay: float) -> None:
    """Raises InputError where `decay` is outside 0 … 1."""
    if not 0 <= decay < 1:
        raise InputError(
            f"training.ema_decay={decay} must be at least 0 and below 1, such as 0.999; null is no average"
        )
