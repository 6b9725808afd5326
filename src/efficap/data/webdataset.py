"""Webdataset shards, read by index and decoded by DALI: the data module for millions of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from efficap.data.loader import CheckedLoader
from efficap.data.module import CaptionDataModule
from efficap.data.order import BatchOrder, EvaluationOrder, ShuffledShards
from efficap.data.pictures import PictureError
from efficap.data.pool import cores, cores_each
from efficap.data.shards.batches import ShardBatches
from efficap.data.shards.examine import BadSample, IndexHeader
from efficap.data.shards.index import ensure_indexes
from efficap.data.shards.names import find_shards
from efficap.data.shards.reader import ShardReader
from efficap.data.shards.tar import Broken, SampleError
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.picture_files import open_picture
from efficap.ranks import first_alone, gathered

LEARN_FROM = 200_000  # captions that a tokenizer is learned from
MOST_THREADS = 16  # of a decoder: each has buffers of its own, on a GPU too


class WebDatasetDataModule(CaptionDataModule):
    """Loaders of `CaptionBatch` over webdataset tars.

    Each tar has an index of its good samples; where it lacks one, or has changed, it is indexed first.

    Args:
        shards, val_shards, test_shards: what `find_shards` knows.
        caption_field: field of the json that holds a caption or a list of them; None takes the .txt.
        index_dir: where the indexes lie; None: beside the tars.
        shuffle_shards: shards whose samples are mixed with each other.
        num_threads: of DALI's decoder; None: as many as the process has cores to itself, at most `MOST_THREADS`.
        common: the arguments of `CaptionDataModule`.
    """

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | list[str] | None,
        test_shards: str | list[str] | None,
        caption_field: str | None,
        index_dir: str | None,
        shuffle_shards: int,
        num_threads: int | None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if shuffle_shards < 1:
            raise InputError(
                f"data.shuffle_shards={shuffle_shards} must be at least 1, which mixes within a shard"
            )
        self.shards = {"train": shards, "val": val_shards, "test": test_shards}
        self.settings = {"train": "data.shards", "val": "data.val_shards", "test": "data.test_shards"}
        self.caption_field, self.shuffle_shards = caption_field, shuffle_shards
        self.index_dir = Path(index_dir).expanduser() if index_dir is not None else None
        self.num_threads = num_threads or min(MOST_THREADS, cores_each())
        self._readers: dict[str, ShardReader] = {}
        self._numbers: dict[str, dict[str, int]] = {}

    def reader(self, split: str) -> ShardReader:
        """The samples of ``train``, ``val`` or ``test``; their shards are indexed first where that is needed.

        Raises:
            InputError: no such shards, no good sample in them, or a shard that is in two splits.
        """
        if split not in self._readers:
            self._readers[split] = self._read(split)
        return self._readers[split]

    def _read(self, split: str) -> ShardReader:
        if self.shards.get(split) is None:
            setting = self.settings.get(split)
            have = ", ".join(name for name, shards in self.shards.items() if shards is not None)
            raise InputError(
                f"split={split}: {f'{setting} is not given' if setting else 'shards know no such split'}; "
                f"there is {have}"
            )
        tars = self._find(split)
        self._check_alike(split, list(map(str, tars)))
        with first_alone(f"index {tars}"):
            headers = ensure_indexes(
                tars,
                index_dir=self.index_dir,
                max_pixels=self.max_pixels,
                workers=cores(),
            )
        self._check_alike(split, [headers[tar].digest for tar in tars])
        for tar in tars:
            self._count_bad(tar, headers[tar])
        reader = ShardReader(
            tars,
            [headers[tar] for tar in tars],
            index_dir=self.index_dir,
            caption_field=self.caption_field,
            text=self.text,
            timeout=self.read_timeout,
            most_open=2 * self.shuffle_shards,
        )
        self.bad_samples.check()
        if not len(reader):
            raise InputError(
                f"{self.settings[split]}={self.shards[split]}: no good sample; {self.bad_samples}"
            )
        return reader

    def _check_alike(self, split: str, own: list[str]) -> None:
        """Raises InputError where processes see different shards."""
        first, *others = gathered(own)
        if any(other != first for other in others):
            raise InputError(
                f"{self.settings[split]}={self.shards[split]}: processes see different shards; are they still being "
                "written? start again when they are all there"
            )

    def _find(self, split: str) -> list[Path]:
        tars = find_shards(self.shards[split] or [], self.settings[split])
        for name, shards in self.shards.items():
            try:
                others = set(find_shards(shards, name)) if name != split and shards is not None else set()
            except InputError:
                continue  # an evaluation does not need the training shards
            if twice := [tar for tar in tars if tar in others]:
                raise InputError(
                    f"{twice[0]} is in {self.settings[split]} and in {self.settings[name]}; "
                    "a model is not to be judged by what it learned from"
                )
        return tars

    def _count_bad(self, tar: Path, header: IndexHeader) -> None:
        self.bad_samples.total += header.good + sum(header.bad.values())
        if header.first_bad is not None:
            self.bad_samples.add_counts(header.bad, str(BadSample(str(tar), *header.first_bad)))
        if header.problem is not None:
            self.bad_samples.total += 1
            self.bad_samples.add(str(tar), header.problem)

    def training_captions(self) -> Iterable[str]:
        """At most `LEARN_FROM` captions, evenly from all shards."""
        reader = self.reader("train")
        for number in range(0, len(reader), -(-len(reader) // LEARN_FROM)):
            try:
                yield from reader.captions(number)
            except Broken:
                continue  # counted when training comes to it

    @property
    def training_size(self) -> int:
        return len(self.reader("train"))

    def _prepare_splits(self, splits: list[str]) -> None:
        for split in splits:
            reader = self.reader(split)
            if split != "train":
                self._numbers[split] = _numbers(reader, self.settings[split])

    def notes(self) -> list[str]:
        lines = super().notes()
        if not torch.cuda.is_available():
            lines.append(
                "no GPU: DALI decodes on the CPU, where data=csv is as fast and needs no shards (docs/benchmarks.md)"
            )
        return lines

    def picture(self, split: str, image_id: str) -> Path | Image.Image:
        if split not in self._numbers:  # the training pictures, whose names may repeat
            reader = self.reader(split)
            self._numbers[split] = {reader.image_id(number): number for number in range(len(reader))}
        try:
            sample = self.reader(split).read(self._numbers[split][image_id])
        except SampleError as error:  # the tar has changed, or its disk is gone
            raise PictureError(error.reason, error.detail) from error
        return open_picture(sample.image, self.max_pixels)

    def train_dataloader(self) -> CheckedLoader:
        counts = self.reader("train").counts
        order = self._training_order(ShuffledShards(counts, self.seed, self.shuffle_shards))
        return self._loader("train", self.training_transform, order)

    def evaluation_dataloader(self, split: str) -> CheckedLoader:
        if split not in self._numbers:  # the training split's names may repeat until it is evaluated
            self._numbers[split] = _numbers(self.reader(split), self.settings[split])
        order = self._evaluation_order(len(self.reader(split)))
        return self._loader(split, self.evaluation_transform, order)

    def _loader(
        self,
        split: str,
        transform: TrainingTransform | EvaluationTransform,
        order: BatchOrder | EvaluationOrder,
    ) -> CheckedLoader:
        batches = ShardBatches(
            self.reader(split),
            order,
            transform,
            self.tokenizer,
            captions_per_image=self.captions_per_image,
            max_tokens=self.max_tokens,
            on_cut=self._count_cut,
            max_pixels=self.max_pixels,
            seed=self.seed,
            batch_size=order.largest,
            num_readers=max(1, self.num_workers),
            num_threads=self.num_threads,
            device=self.device,
        )
        return self._checked_loader(batches, order)

    def _count_cut(self, captions: int) -> None:
        self.cut_captions += captions


def _numbers(reader: ShardReader, setting: str) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for number in range(len(reader)):
        try:
            image_id = reader.image_id(number)
        except Broken as error:  # of a tar that was there a moment ago
            raise InputError(f"{setting}: {error}") from error
        if numbers.setdefault(image_id, number) != number:
            raise InputError(
                f"{setting}: {reader.name(numbers[image_id])} and {reader.name(number)} are both called {image_id}; "
                "scores need names that differ"
            )
    return numbers
