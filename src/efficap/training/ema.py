"""An exponential moving average of the weights, validated and kept in place of them."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

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

        def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
            n = float(count)
            if averaged[0].is_floating_point():
                torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + n) / (10 + n)))
            else:  # BatchNorm's count of batches
                torch._foreach_copy_(averaged, current)

        super().__init__(multi_avg_fn=average)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device  # the model itself is moved there only later
        super().setup(trainer, pl_module, stage)


def check_decay(decay: float) -> None:
    """Raises InputError where `decay` is outside 0 … 1."""
    if not 0 <= decay < 1:
        raise InputError(
            f"training.ema_decay={decay} must be at least 0 and below 1, such as 0.999; null is no average"
        )
