"""Weights & Biases as a guest of the training: where it fails, it is left out from then on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import WandbLogger


class GuestWandbLogger(WandbLogger):
    """Lightning's logger, whose first failure is its last: W&B's own process may be gone, or its disk full.

    Attributes:
        is_lost: whether it has failed.
    """

    is_lost = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_metrics, *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_hyperparams, *args, **kwargs)

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        self._attempt(super().log_table, *args, **kwargs)

    def finalize(self, status: str) -> None:
        self._attempt(super().finalize, status)

    def _attempt(self, function: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.is_lost:
            return
        try:
            function(*args, **kwargs)
        except Exception as error:  # of many kinds, by what has failed
            self.is_lost = True
            reason = " ".join(str(error).split()) or type(error).__name__
            print(
                f"W&B has failed and is told no more, training goes on; metrics.csv has everything: {reason}",
                file=sys.stderr,
            )
