"""An exponential moving average of the weights, validated and kept in place of them."""

from __future__ import annotations

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
        if not 0 <= decay < 1:
            raise InputError(
                f"ema_decay={decay} must be at least 0 and below 1, such as 0.999; null is no average"
            )

        def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
            if not averaged.is_floating_point():  # BatchNorm's count of batches
                return current
            n = float(count)
            return torch.lerp(averaged, current.to(averaged.dtype), 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(avg_fn=average)
