"""Pictures in a folder, captions in a CSV: the data module for a user's own data."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from efficap.batch import CaptionBatch
from efficap.data.dataset import CaptionedImages, EncodedCaptions, EpochOrder, Item, collate
from efficap.data.table import CaptionTable, check_images, read_table
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer


class CSVDataModule(pl.LightningDataModule):
    """Loaders of `CaptionBatch` over the splits of a caption table.

    Args:
        table: the CSV, a row for each caption.
        image_dir: what the picture names in it are relative to.
        image_column, caption_column, split_column: names of its columns.
        train_split, val_split, test_split: values of its split column.
        captions_per_image: K.
        max_tokens: longest caption in tokens, BOS and EOS counted; longer ones are cut.
        batch_size: B.
        num_workers: loader processes; None takes one core less than there are, at most 8.
        check_images: decode every picture once before training.
        crop_scale, crop_ratio, flip: see `TrainingTransform`.
        seed: of order, crops and the choice of captions.
    """

    def __init__(
        self,
        *,
        table: str,
        image_dir: str,
        image_column: str,
        caption_column: str,
        split_column: str,
        train_split: str,
        val_split: str,
        test_split: str,
        captions_per_image: int,
        max_tokens: int,
        batch_size: int,
        num_workers: int | None,
        check_images: bool,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: bool,
        seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("captions_per_image", captions_per_image, 1),
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 3),
        ):
            if value < least:
                raise InputError(f"data.{name}={value} must be at least {least}")
        self.table, self.image_dir = Path(table).expanduser(), Path(image_dir).expanduser()
        self.columns = {
            "image_column": image_column,
            "caption_column": caption_column,
            "split_column": split_column,
        }
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.captions_per_image, self.max_tokens = captions_per_image, max_tokens
        self.batch_size, self.check, self.seed = batch_size, check_images, seed
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.crop: dict[str, Any] = {
            "crop_scale": tuple(crop_scale),
            "crop_ratio": tuple(crop_ratio),
            "flip": flip,
        }
        self.cut_captions = 0
        self._splits: dict[str, CaptionTable] = {}
        self._encoded: dict[str, EncodedCaptions] = {}
        self._epoch = 0

    def split(self, name: str) -> CaptionTable:
        """The pictures of a split; `train`, `val` and `test` go by the configured names, others by their own.

        Raises:
            InputError: the table cannot be used or has no such split.
        """
        if not self._splits:
            self._splits = read_table(self.table, self.image_dir, **self.columns)
        in_table = self.split_names.get(name, name)
        if in_table not in self._splits:
            sizes = ", ".join(f"{split} ({len(table)} pictures)" for split, table in self._splits.items())
            setting = f"data.{name}_split={in_table}" if name in self.split_names else f"split={name}"
            raise InputError(f"{setting}: {self.table} has no picture in that split; it has {sizes}")
        return self._splits[in_table]

    def prepare(
        self,
        tokenizer: CaptionTokenizer,
        *,
        image_size: int,
        interpolation: str,
        crop_pct: float,
        splits: list[str],
    ) -> None:
        """Check the pictures and encode the captions of `splits` once, before any loader is asked for.

        Raises:
            InputError: a missing or unreadable picture, or a split that is not there.
        """
        tables = {name: self.split(name) for name in splits}
        if self.check:
            check_images([file for table in tables.values() for file in table.files])
        self.evaluation_transform = EvaluationTransform(
            image_size=image_size, interpolation=interpolation, crop_pct=crop_pct
        )
        self.training_transform = TrainingTransform(
            image_size=image_size, interpolation=interpolation, **self.crop
        )
        self.pad_id = tokenizer.pad_id
        for name, table in tables.items():
            ids, cut = tokenizer.encode(table.captions, self.max_tokens)
            self.cut_captions += cut
            self._encoded[name] = EncodedCaptions(ids, [len(references) for references in table.references])

    def train_dataloader(self) -> DataLoader[Item]:
        images = self._images("train", self.training_transform)
        order = EpochOrder(
            len(images), self.seed, first_epoch=self.trainer.current_epoch if self.trainer else 0
        )
        # A last batch of a few pictures would give BatchNorm poor statistics.
        rest = len(images) % self.batch_size
        few = len(images) > self.batch_size and rest < self.batch_size / 4
        return self._loader(images, sampler=order, drop_last=few)

    def val_dataloader(self) -> DataLoader[Item]:
        return self.evaluation_dataloader("val")

    def evaluation_dataloader(self, split: str) -> DataLoader[Item]:
        """Every picture of a prepared split once, in order, as evaluation sees it, with all its references."""
        images = self._images(split, self.evaluation_transform)
        return self._loader(images, sampler=[(0, index) for index in range(len(images))], drop_last=False)

    def transfer_batch_to_device(self, batch: CaptionBatch, device: torch.device, _: int) -> CaptionBatch:
        """Called by Lightning; from page-locked memory the copy overlaps with the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")

    def _images(self, split: str, transform: TrainingTransform | EvaluationTransform) -> CaptionedImages:
        return CaptionedImages(
            self.split(split),
            self._encoded[split],
            transform,
            captions_per_image=self.captions_per_image,
            seed=self.seed,
        )

    def _loader(self, images: CaptionedImages, sampler: Any, drop_last: bool) -> DataLoader[Item]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            collate_fn=functools.partial(collate, pad_id=self.pad_id),
        )


def default_workers() -> int:
    """Loader processes where none are asked for: one less than this process may use cores, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return min(8, max(1, cores - 1))
