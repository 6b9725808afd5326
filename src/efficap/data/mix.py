"""Several data sets in one training: one after the other, or mixed batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from efficap.data.caption_data import CaptionData
from efficap.data.loader import CheckedLoader
from efficap.data.mixture import InTurnLoader, MixedLoader, WeightedLoader
from efficap.data.module import CaptionDataModule
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer


class MixedDataModule(CaptionData):
    """Batches of several data modules; each batch comes from one of them.

    An epoch of the mixture is all of `epochs`, or `steps_per_epoch` batches by `weights`. A set's own epochs go on from
    one epoch of the mixture to the next, so its order and its captions go round as they do without the others.

    Args:
        sources: the data sets, by name.
        epochs: how many epochs of each, one set after the other, as ``{cc3m: 2, coco: 1}``.
        weights: or how much of each, as ``{cc3m: 3, coco: 1}``.
        steps_per_epoch: with `weights`, batches that make an epoch; None: as many as all sets have together.
        evaluate_on: the set whose validation and test splits are used.

    Raises:
        InputError: both or neither of epochs and weights, a name that is not in `sources`, or no number above 0.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, CaptionDataModule],
        epochs: Mapping[str, int] | None,
        weights: Mapping[str, float] | None,
        steps_per_epoch: int | None,
        evaluate_on: str,
    ) -> None:
        super().__init__()
        if (epochs is None) == (weights is None):
            raise InputError(
                f"data.epochs={epochs} and data.weights={weights}: give one of them, and null for the other"
            )
        setting, amounts = ("data.epochs", epochs) if epochs is not None else ("data.weights", weights)
        assert amounts is not None
        _check_amounts(setting, amounts, sources, whole=epochs is not None)
        if evaluate_on not in sources:
            raise InputError(f"data.evaluate_on={evaluate_on} is none of {', '.join(sources)}")
        if steps_per_epoch is not None and (weights is None or steps_per_epoch < 1):
            raise InputError(
                f"data.steps_per_epoch={steps_per_epoch} must be at least 1, and goes with data.weights"
            )
        self.sources = {name: sources[name] for name in amounts}
        self.epochs, self.weights, self.steps_per_epoch = epochs, weights, steps_per_epoch
        self.evaluated = sources[evaluate_on]
        self._all = {**self.sources, evaluate_on: self.evaluated}
        modules = self.sources.values()
        self.captions_per_image = max(module.captions_per_image for module in modules)
        self.max_tokens = max(module.max_tokens for module in modules)
        self.batch_size = max(module.batch_size for module in modules)

    def prepare_data(self) -> None:
        for source in self._all.values():
            source.prepare_data()

    def begin(self, device: torch.device, current_epoch: Callable[[], int]) -> None:
        super().begin(device, current_epoch)
        for source in self._all.values():
            source.begin(device, current_epoch)

    def end(self) -> None:
        super().end()
        for source in self._all.values():
            source.end()

    def training_captions(self) -> Iterable[str]:
        return itertools.chain.from_iterable(source.training_captions() for source in self.sources.values())

    @property
    def training_size(self) -> int:
        return sum(source.training_size for source in self.sources.values())

    def prepare(
        self,
        tokenizer: CaptionTokenizer,
        *,
        image_size: int,
        interpolation: str,
        crop_pct: float,
        splits: list[str],
    ) -> None:
        size: dict[str, Any] = {
            "image_size": image_size,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
        }
        trained = self.sources.values() if len(splits) > 1 else [self.evaluated]  # one alone is evaluated
        for source in self._all.values():
            own = [s for s in splits if (source in trained if s == "train" else source is self.evaluated)]
            if own:
                source.prepare(tokenizer, **size, splits=own)

    def train_dataloader(self) -> MixedLoader:
        for source in self.sources.values():
            source.begun_by = self.begun_by
        loaders = {name: source.train_dataloader() for name, source in self.sources.items()}
        if self.epochs is not None:
            loader: MixedLoader = InTurnLoader(loaders, self.epochs, self._next_place)
        else:
            assert self.weights is not None
            loader = WeightedLoader(loaders, self.weights, self.steps_per_epoch, self._next_place)
        self._training = loader
        return loader

    def evaluation_dataloader(self, split: str) -> CheckedLoader:
        return self.evaluated.evaluation_dataloader(split)

    def picture(self, split: str, image_id: str) -> Path | Image.Image:
        return self.evaluated.picture(split, image_id)

    def attribute(self, split: str, name: str) -> dict[str, str]:
        return self.evaluated.attribute(split, name)

    def coco_ids(self) -> dict[str, int]:
        return self.evaluated.coco_ids()

    def notes(self) -> list[str]:
        return [f"{name}: {note}" for name, source in self._all.items() for note in source.notes()]

    def left_out(self) -> dict[str, int]:
        return {
            f"{name}: {reason}": count
            for name, source in self._all.items()
            for reason, count in source.left_out().items()
        }


def _check_amounts(
    setting: str, amounts: Mapping[str, float], sources: Mapping[str, Any], whole: bool
) -> None:
    for name, amount in amounts.items():
        if name not in sources:
            raise InputError(f"{setting}.{name}={amount}: data.sources has {', '.join(sources)}")
        if not isinstance(amount, int if whole else int | float) or amount <= 0:
            raise InputError(f"{setting}.{name}={amount} must be {'a whole number ' if whole else ''}above 0")
    if not amounts:
        raise InputError(f"{setting} is empty: name some of {', '.join(sources)}")
