"""Pictures with their captions as items, items as batches, and the order that they come in.

B images, K captions of each, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from efficap.batch import CaptionBatch
from efficap.data.table import CaptionTable
from efficap.data.transforms import EvaluationTransform, TrainingTransform, load_rgb

Item = dict[str, Any]


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

    def __init__(
        self,
        table: CaptionTable,
        captions: EncodedCaptions,
        transform: TrainingTransform | EvaluationTransform,
        *,
        captions_per_image: int,
        seed: int,
    ) -> None:
        self.table, self.captions, self.transform = table, captions, transform
        self.K, self.seed = captions_per_image, seed

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        image = load_rgb(self.table.files[index])
        captions, references = self.captions.of(index), None
        if isinstance(self.transform, TrainingTransform):
            pixels = self.transform(image, np.random.default_rng((self.seed, epoch, index)))
            captions = [captions[n] for n in self._turn(len(captions), epoch, index)]
        else:
            pixels = self.transform(image)
            references = self.table.references[index]
        return {
            "image": pixels,
            "captions": captions,
            "image_id": self.table.image_ids[index],
            "references": references,
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
