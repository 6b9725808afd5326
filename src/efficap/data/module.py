"""What every data module does alike: the settings of batches, crops and text, and the answers that training needs."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image

from efficap.batch import CaptionBatch
from efficap.data.bad_samples import BadSamples
from efficap.data.loader import Batches, CheckedLoader, Place, Placed
from efficap.data.order import BatchOrder, EvaluationOrder, Order
from efficap.data.text import CaptionText
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.ranks import rank, world_size
from efficap.tokenizer import CaptionTokenizer

_log = logging.getLogger(__name__)


class CaptionData(pl.LightningDataModule, ABC):
    """What training, evaluation and captioning ask of data.

    Attributes:
        captions_per_image: K.
        max_tokens: longest caption in tokens, BOS and EOS counted.
        batch_size: B of one process.
        first_epoch: of the training's, that its trainer counts as 0: the order goes on from the stages before.
        begun_by: processes that the training was begun with, whose batches together are a step's; None: those of now.
    """

    captions_per_image: int
    max_tokens: int
    batch_size: int
    first_epoch: int = 0
    begun_by: int | None = None
    _resumed: Place | None = None  # where the first epoch after resuming goes on
    _training: Placed | None = None  # the loader of the training

    def state_dict(self) -> dict[str, Any]:
        """Where training is in the data; Lightning keeps it in its checkpoints."""
        place = list(self._training.place) if self._training is not None else [0, 0]
        return {"place": place, "processes": self.begun_by or self._ranks[1]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        epoch, batch = state_dict["place"]
        self._resumed = (epoch, batch)

    def teardown(self, stage: str) -> None:
        """Called by Lightning at the end; processes that load end with their loader."""
        self._training = self.trainer = None

    def _next_place(self) -> Place:
        """The epoch and the batch that the next iteration of the training begins with."""
        place, self._resumed = self._resumed, None
        epoch = self.first_epoch + (self.trainer.current_epoch if self.trainer else 0)
        return place if place is not None and place[0] == epoch else (epoch, 0)

    @property
    def _ranks(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (rank(), world_size())

    def training_batch(self, epoch: int, first: int, image_ids: list[str]) -> CaptionBatch:
        """A batch of the training once more: of `epoch`, its batch `first` or the next one of these pictures.

        What the training itself reads at the time is broken off.
        """
        assert self._training is not None
        batches = self._training.of_epoch(epoch, first)
        return next(batch for batch in batches if batch.image_ids == image_ids)

    @abstractmethod
    def training_captions(self) -> Iterable[str]:
        """Captions to learn a tokenizer from."""

    @property
    @abstractmethod
    def training_size(self) -> int:
        """Pictures of the training split."""

    @abstractmethod
    def prepare(
        self,
        tokenizer: CaptionTokenizer,
        *,
        image_size: int,
        interpolation: str,
        crop_pct: float,
        splits: list[str],
    ) -> None:
        """Check the pictures of `splits` and get their captions ready, once, before any loader is asked for.

        Raises:
            InputError: a split that is not there, or more bad samples than are allowed.
        """

    @abstractmethod
    def evaluation_dataloader(self, split: str) -> CheckedLoader:
        """Every picture of a prepared split once, in turn, as evaluation sees it, with all its references."""

    @abstractmethod
    def picture(self, split: str, image_id: str) -> Path | Image.Image:
        """A picture to show: its file, or itself."""

    def attribute(self, split: str, name: str) -> dict[str, str]:
        """The value of a column of the table for each picture of a split, by image id; "" where there is none.

        Raises:
            InputError: there is no such column, or no table.
        """
        raise InputError(f"by={name} needs a table with such a column: add +data.table=… +data.image_dir=…")

    def coco_ids(self) -> dict[str, int]:
        """The numbers of the pictures, by image id, where the table is COCO's; else nothing."""
        return {}

    @abstractmethod
    def notes(self) -> list[str]:
        """What a person should know of the prepared data, a line each."""

    @abstractmethod
    def left_out(self) -> dict[str, int]:
        """Bad samples so far, by reason."""

    def val_dataloader(self) -> CheckedLoader:
        return self.evaluation_dataloader("val")

    def transfer_batch_to_device(self, batch: CaptionBatch, device: torch.device, _: int) -> CaptionBatch:
        """Called by Lightning; from page-locked memory the copy overlaps with the step before."""
        return batch.to(device, non_blocking=device.type == "cuda")


class CaptionDataModule(CaptionData):
    """Loaders of `CaptionBatch` over one data set.

    Args:
        captions_per_image: K.
        max_tokens: longest caption in tokens, BOS and EOS counted; longer ones are cut.
        batch_size: B of one process.
        num_workers: processes or threads that load; None takes one core less than there are, at most 8.
        steps_per_epoch: batches that make an epoch; None: once through the data.
        crop_scale, crop_ratio, flip, scaled_decoding: see `TrainingTransform`.
        text: keyword arguments of `CaptionText`.
        on_bad_sample, max_bad_fraction: see `BadSamples`.
        max_pixels: larger pictures are bad samples.
        read_timeout: seconds after which a file that is still being read is a bad sample; None: never.
        feature_cache: whether training is to read feature maps of a frozen encoder; for tables alone.
        feature_cache_dir: where such maps are kept; None: beside the table.
        seed: of order, crops and the choice of captions.

    Attributes:
        bad_samples, text: what was left out, by reason.
        cut_captions: number of captions that were longer than `max_tokens`.

    Raises:
        InputError: a size that is too small, or what those that take the settings raise.
    """

    def __init__(
        self,
        *,
        captions_per_image: int,
        max_tokens: int,
        batch_size: int,
        num_workers: int | None,
        steps_per_epoch: int | None,
        crop_scale: tuple[float, float],
        crop_ratio: tuple[float, float],
        flip: bool,
        scaled_decoding: bool,
        text: Mapping[str, Any],
        on_bad_sample: str,
        max_bad_fraction: float,
        max_pixels: int,
        feature_cache: bool,
        feature_cache_dir: str | None,
        seed: int,
        read_timeout: float | None = None,  # the runs of earlier versions do not have it
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("captions_per_image", captions_per_image, 1),
            ("batch_size", batch_size, 1),
            ("max_tokens", max_tokens, 3),
            ("steps_per_epoch", steps_per_epoch, 1),
            ("max_pixels", max_pixels, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"data.{name}={value} must be at least {least}")
        if read_timeout is not None and not read_timeout > 0:
            raise InputError(f"data.read_timeout={read_timeout} must be above 0 seconds; null: no limit")
        if feature_cache and flip:
            raise InputError(
                "data.flip=true must not come with data.feature_cache=true, as a cached picture cannot be mirrored; "
                "leave out one of the two"
            )
        self.feature_cache = feature_cache
        self.cache_dir = Path(feature_cache_dir).expanduser() if feature_cache_dir is not None else None
        self.captions_per_image, self.max_tokens, self.batch_size = captions_per_image, max_tokens, batch_size
        self.num_workers = default_workers() if num_workers is None else num_workers
        self.steps_per_epoch, self.max_pixels, self.seed = steps_per_epoch, max_pixels, seed
        self.read_timeout = read_timeout
        self.crop: dict[str, Any] = {
            "crop_scale": tuple(crop_scale),
            "crop_ratio": tuple(crop_ratio),
            "flip": flip,
            "scaled_decoding": scaled_decoding,
        }
        self.text = CaptionText(**text)
        self.bad_samples = BadSamples(on_bad_sample=on_bad_sample, max_bad_fraction=max_bad_fraction)
        self.cut_captions = 0

    def prepare(
        self,
        tokenizer: CaptionTokenizer,
        *,
        image_size: int,
        interpolation: str,
        crop_pct: float,
        splits: list[str],
    ) -> None:
        size: dict[str, Any] = {"image_size": image_size, "interpolation": interpolation}
        self.evaluation_transform = EvaluationTransform(**size, crop_pct=crop_pct)
        self.training_transform = TrainingTransform(**size, **self.crop)
        self.tokenizer = tokenizer
        self._prepare_splits(splits)

    @abstractmethod
    def _prepare_splits(self, splits: list[str]) -> None: ...

    @abstractmethod
    def train_dataloader(self) -> CheckedLoader: ...

    def notes(self) -> list[str]:
        lines = []
        if self.bad_samples:
            lines.append(f"left out, as they cannot be used: {self.bad_samples}")
        if self.text.left_out:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.text.left_out.most_common())
            lines.append(f"captions not learned: {self.text.left_out.total():,} ({reasons})")
        if self.cut_captions:
            lines.append(
                f"{self.cut_captions:,} captions are longer than data.max_tokens={self.max_tokens} and were cut; "
                "EOS stays"
            )
        return lines

    def left_out(self) -> dict[str, int]:
        return dict(self.bad_samples.counts)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def _training_order(self, order: Order) -> BatchOrder:
        rank, world = self._ranks
        batches = BatchOrder(
            order,
            batch_size=self.batch_size,
            rank=rank,
            world=world,
            steps_per_epoch=self.steps_per_epoch,
            begun_by=self.begun_by,
        )
        if batches.lost and rank == 0:
            _log.warning(
                "%d samples an epoch are left over: %d processes cannot share them", batches.lost, world
            )
        return batches

    def _evaluation_order(self, size: int) -> EvaluationOrder:
        rank, world = self._ranks
        return EvaluationOrder(size, batch_size=self.batch_size, rank=rank, world=world)

    def _checked_loader(self, batches: Batches, order: BatchOrder | EvaluationOrder) -> CheckedLoader:
        is_training = isinstance(order, BatchOrder)
        loader = CheckedLoader(
            batches,
            order,
            self.bad_samples,
            world=self._ranks[1],
            place=self._next_place if is_training else lambda: (0, 0),
        )
        if is_training:
            self._training = loader
        return loader


def default_workers() -> int:
    """Loader processes where none are asked for: one less than this process may use cores, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
    return min(8, max(1, cores - 1))
