"""Pictures in a folder, captions in a CSV: the data module for a user's own data.

B images, K captions of each, T tokens.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from efficap.batch import CaptionBatch
from efficap.data.table import CaptionTable, check_images, read_table
from efficap.data.transforms import EvaluationTransform, TrainingTransform, load_rgb
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer

Item = dict[str, Any]


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
        images = CaptionedImages(self, "train", training=True)
        order = EpochOrder(
            len(images), self.seed, first_epoch=self.trainer.current_epoch if self.trainer else 0
        )
        # A last batch of one or two pictures would give BatchNorm poor statistics.
        return self._loader(images, sampler=order, drop_last=len(images) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[Item]:
        return self.evaluation_dataloader("val")

    def evaluation_dataloader(self, split: str) -> DataLoader[Item]:
        """Every picture of a prepared split once, in order, as evaluation sees it, with all its references."""
        images = CaptionedImages(self, split, training=False)
        return self._loader(images, sampler=[(0, index) for index in range(len(images))], drop_last=False)

    def transfer_batch_to_device(self, batch: CaptionBatch, device: torch.device, _: int) -> CaptionBatch:
        """Called by Lightning; from page-locked memory the copy overlaps with the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")

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


def collate(items: list[Item], pad_id: int) -> CaptionBatch:
    """Items of `CaptionedImages` to one batch; K and T are no larger than these items need."""
    most = max(len(item["captions"]) for item in items)
    longest = max(len(ids) for item in items for ids in item["captions"])
    tokens = torch.full((len(items), most, longest), pad_id)  # (B, K, T)
    lengths = torch.zeros(len(items), most, dtype=torch.int64)  # (B, K)
    for b, item in enumerate(items):
        for k, ids in enumerate(item["captions"]):
            tokens[b, k, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
            lengths[b, k] = len(ids)
    references = None if items[0]["references"] is None else [item["references"] for item in items]
    images = torch.stack([item["image"] for item in items])  # (B, 3, H, W)
    return CaptionBatch(images, tokens, lengths, [item["image_id"] for item in items], references)


class EncodedCaptions:
    """All captions of a split as ids in one flat array, so that loader processes share it without copies."""

    def __init__(self, captions: list[list[int]], per_image: list[int]) -> None:
        self.ids: NDArray[np.int32] = np.fromiter((i for ids in captions for i in ids), dtype=np.int32)
        self.starts: NDArray[np.int64] = np.cumsum([0, *map(len, captions)])
        self.first: NDArray[np.int64] = np.cumsum([0, *per_image])

    def of(self, image: int) -> list[NDArray[np.int32]]:
        """The ids of each caption of picture number `image`."""
        numbers = range(self.first[image], self.first[image + 1])
        return [self.ids[self.starts[n] : self.starts[n + 1]] for n in numbers]


class CaptionedImages(Dataset[Item]):
    """One item a picture, a pure function of (seed, epoch, picture).

    In training its pixels and K of its captions; in evaluation all captions, so that a loss does not depend on K.
    """

    def __init__(self, data: CSVDataModule, split: str, training: bool) -> None:
        self.table, self.captions = data.split(split), data._encoded[split]
        self.K, self.seed, self.training = data.captions_per_image, data.seed, training
        self.training_transform = data.training_transform
        self.evaluation_transform = data.evaluation_transform

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        image = load_rgb(self.table.files[index])
        captions = self.captions.of(index)
        if self.training:
            pixels = self.training_transform(image, np.random.default_rng((self.seed, epoch, index)))
            captions = [captions[n] for n in self._turn(len(captions), epoch, index)]
        else:
            pixels = self.evaluation_transform(image)
        return {
            "image": pixels,
            "captions": captions,
            "image_id": self.table.image_ids[index],
            "references": None if self.training else self.table.references[index],
        }

    def _turn(self, count: int, epoch: int, index: int) -> list[int]:
        """K of `count` captions without repeats, going round over the epochs so that all are used."""
        order = np.random.default_rng((self.seed, index)).permutation(count)
        first = epoch * self.K % count
        return [int(order[(first + k) % count]) for k in range(min(self.K, count))]


class EpochOrder(Sampler[tuple[int, int]]):
    """Every picture once an epoch, as (epoch, picture), in an order that follows from seed and epoch alone."""

    def __init__(self, size: int, seed: int, first_epoch: int) -> None:
        self.size, self.seed, self.epoch = size, seed, first_epoch

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.size)
        return ((epoch, int(index)) for index in order)
