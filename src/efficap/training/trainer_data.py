"""Data as Lightning's Trainer asks for them: what reads them knows nothing of it, and starts without it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

from efficap.batch import CaptionBatch
from efficap.data.caption_data import CaptionData
from efficap.data.loader import CheckedLoader, Placed


class TrainerData(pl.LightningDataModule):
    """Prepared data for a training. Where it is in them, checkpoints keep, as `Checkpoint.data_state`.

    Args:
        data: prepared.
    """

    def __init__(self, data: CaptionData) -> None:
        super().__init__()
        self.data = data

    def setup(self, stage: str) -> None:
        trainer = self.trainer
        assert trainer is not None
        self.data.begin(trainer.strategy.root_device, lambda: trainer.current_epoch)

    def train_dataloader(self) -> Placed:
        return self.data.train_dataloader()

    def val_dataloader(self) -> CheckedLoader:
        return self.data.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def transfer_batch_to_device(self, batch: CaptionBatch, device: torch.device, _: int) -> CaptionBatch:
        """From page-locked memory the copy overlaps with the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")
