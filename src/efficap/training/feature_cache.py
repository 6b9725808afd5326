"""Training on cached features: a frozen encoder sees each picture once, later epochs and runs read what it made of it.

B pictures, C channels, h x w positions of a feature map.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from efficap.data.caption_data import CaptionData
from efficap.data.csv import CSVDataModule
from efficap.data.features import FeatureStore, Stamp, stamp
from efficap.data.mix import MixedDataModule
from efficap.data.module import CaptionDataModule
from efficap.data.pictures import Picture, PictureError
from efficap.errors import InputError
from efficap.models.encoder import ImageEncoder
from efficap.models.fold import fold_norms

VERSION = 2  # another one for other maps of the same weights and settings, or in another order

Pictures = list[tuple[Path, Stamp | None]]


def check_feature_cache(data: CaptionData, *, frozen: bool, start_size: int | None) -> None:
    """Raise InputError where data.feature_cache is asked for and cannot be had.

    Args:
        frozen: whether the encoder is.
        start_size: pixels that pictures are to grow from; None: they do not.
    """
    modules = [data.evaluated, *data.sources.values()] if isinstance(data, MixedDataModule) else [data]
    if not any(isinstance(module, CaptionDataModule) and module.feature_cache for module in modules):
        return
    if not isinstance(data, CSVDataModule):
        raise InputError(
            "data.feature_cache=true: only tables (data=csv) are cached; "
            "data.feature_cache=false takes shards and mixtures as they are"
        )
    if not frozen:
        raise InputError(
            "data.feature_cache=true must come with model.encoder.frozen=true, as an encoder that learns makes "
            "other features at each step; data.feature_cache=false trains it"
        )
    if start_size is not None:
        raise InputError(
            f"training.start_size={start_size} must not come with data.feature_cache=true, as a cached picture cannot "
            "grow; leave out one of the two"
        )


def cache_features(
    encoder: ImageEncoder,
    data: CaptionData,
    *,
    name: str,
    preprocessing: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Where data.feature_cache asks for it, let the training and validation pictures come as their feature maps.

    Pictures without a map in the store of this encoder are encoded first, from the evaluation's crop.

    Args:
        encoder: frozen, with the weights that it keeps.
        data: prepared for both splits.
        name: timm's name of the encoder.
        preprocessing: how pictures are made for it.
        device: where it encodes them.

    Raises:
        InputError: the store cannot be read or written, the disk has no room, or too many pictures are bad.
    """
    if not (isinstance(data, CSVDataModule) and data.feature_cache):
        return
    digest = encoder_digest(encoder, name, preprocessing)
    folder = data.feature_cache_dir / f"{name}-{preprocessing['image_size']}px-{digest}"
    store = FeatureStore(folder, (encoder.channels, *encoder.grid))
    splits = {split: _pictures(data, split) for split in ("train", "val")}
    pictures = [picture for split in splits.values() for picture in split]
    if store.lacking(_stamps(pictures)):
        with store.writing():
            lacking = [pictures[place] for place in store.lacking(_stamps(pictures))]
            _announce(store, len(lacking), len(pictures))
            store.check_room(len(lacking))
            _fill(store, encoder, lacking, data, device)
    for split, its_pictures in splits.items():
        data.use_features(split, store.maps_of(_stamps(its_pictures)))


def encoder_digest(encoder: ImageEncoder, name: str, preprocessing: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of all that a feature map depends on but its picture."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(
        json.dumps([VERSION, name, encoder.reduction, dict(preprocessing)], sort_keys=True).encode()
    )
    for key, value in {**encoder.state_dict(), "mean": encoder.mean, "std": encoder.std}.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pictures(data: CSVDataModule, split: str) -> Pictures:
    table = data.in_training(split)
    files = table.files
    return [(file, stamp(image_id, file)) for image_id, file in zip(table.image_ids, files, strict=True)]


def _stamps(pictures: Pictures) -> list[Stamp | None]:
    return [picture for _, picture in pictures]


def _announce(store: FeatureStore, lacking: int, total: int) -> None:
    print(
        f"caching features: {lacking:,} of {total:,} pictures to encode, "
        f"{lacking * store.bytes_each / 2**30:,.2f} GiB to write to {store.folder}",
        file=sys.stderr,
    )


def _fill(
    store: FeatureStore, encoder: ImageEncoder, lacking: Pictures, data: CSVDataModule, device: torch.device
) -> None:
    encoder = copy.deepcopy(encoder).to(device).eval()
    fold_norms(encoder.backbone)
    with _progress() as progress:
        bar = progress.add_task("Caching features", total=len(lacking))
        for places, images, bad in _batches(lacking, data, pin_memory=device.type == "cuda"):
            for place, error in bad:
                data.bad_samples.add(str(lacking[place][0]), error.reason, error.detail)
            if bad:
                data.bad_samples.check()
            if images is not None:
                stamps = [found for place in places if (found := lacking[place][1])]
                with torch.inference_mode():
                    store.append(stamps, encoder(images.to(device, non_blocking=True)))
            progress.advance(bar, len(places) + len(bad))


Batch = tuple[list[int], Tensor | None, list[tuple[int, PictureError]]]


def _batches(pictures: Pictures, data: CSVDataModule, *, pin_memory: bool) -> Iterator[Batch]:
    """Places and (B, 3, S, S) uint8 pixels of those that can be read, and places of the others with the reason."""
    loader: DataLoader[Any] = DataLoader(
        _Pixels(pictures, data),
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # training draws the same whether there was something to fill or not
    )
    return iter(loader)


class _Pixels(Dataset[Any]):
    """Pictures as evaluation sees them; the `PictureError` in place of those that cannot be read."""

    def __init__(self, pictures: Pictures, data: CSVDataModule) -> None:
        self.pictures, self.transform = pictures, data.evaluation_transform
        self.limits: dict[str, Any] = {"max_pixels": data.max_pixels, "timeout": data.read_timeout}

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> tuple[int, Tensor | PictureError]:
        file, found = self.pictures[place]
        try:
            if found is None:
                raise PictureError("missing")
            return place, self.transform(Picture(file, **self.limits))
        except PictureError as error:
            return place, error


def _collate(items: Sequence[tuple[int, Tensor | PictureError]]) -> Batch:
    good = [(place, pixels) for place, pixels in items if isinstance(pixels, Tensor)]
    bad = [(place, error) for place, error in items if isinstance(error, PictureError)]
    images = torch.stack([pixels for _, pixels in good]) if good else None  # (B, 3, S, S)
    return [place for place, _ in good], images, bad


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f} pictures/s", style="progress.data.speed")


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
