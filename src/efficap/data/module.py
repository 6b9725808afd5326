"""What every data module of one source does alike: the settings of batches, crops and text."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efficap.data.bad_samples import BadSamples
from efficap.data.caption_data import CaptionData
from efficap.data.loader import Batches, CheckedLoader
from efficap.data.order import BatchOrder, EvaluationOrder, Order
from efficap.data.pool import cores_each
from efficap.data.text import CaptionText
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.ranks import is_first, rank, world_size
from efficap.tokenizer import CaptionTokenizer

_log = logging.getLogger(__name__)


class CaptionDataModule(CaptionData):
    """Loaders of `CaptionBatch` over one data set.

    Args:
        captions_per_image: K.
        max_tokens: longest caption in tokens, BOS and EOS counted; longer ones are cut.
        batch_size: B of one process.
        num_workers: processes or threads that load; None takes one core less than the process has to itself, at most 8.
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
        self._loaders: list[CheckedLoader] = []

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

    def _training_order(self, order: Order) -> BatchOrder:
        batches = BatchOrder(
            order,
            batch_size=self.batch_size,
            rank=rank(),
            world=world_size(),
            steps_per_epoch=self.steps_per_epoch,
            begun_by=self.begun_by,
        )
        if batches.lost and is_first():
            _log.warning(
                "%d samples an epoch are left over: %d processes cannot share them",
                batches.lost,
                world_size(),
            )
        return batches

    def _evaluation_order(self, size: int) -> EvaluationOrder:
        return EvaluationOrder(size, batch_size=self.batch_size, rank=rank(), world=world_size())

    def _checked_loader(self, batches: Batches, order: BatchOrder | EvaluationOrder) -> CheckedLoader:
        is_training = isinstance(order, BatchOrder)
        loader = CheckedLoader(
            batches,
            order,
            self.bad_samples,
            world=world_size(),
            place=self._next_place if is_training else lambda: (0, 0),
        )
        if is_training:
            self._training = loader
        self._loaders.append(loader)
        return loader

    def end(self) -> None:
        super().end()
        for loader in self._loaders:
            loader.close()
        self._loaders = []


def default_workers() -> int:
    """Loader processes where none are asked for: one less than this process has cores to itself, 1 to 8."""
    return min(8, max(1, cores_each() - 1))
