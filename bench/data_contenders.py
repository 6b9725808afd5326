"""The ways of loading that `bench/data.py` compares, each over the same files.

B pictures, K captions of each, T tokens, S: SIDE.

A contender is opened once and gives an epoch at each call: an iterator of the (B, 3, S, S) uint8 pictures of a batch
and the number of captions that came with them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE, BATCH = 224, 32
SCALE, RATIO = (0.6, 1.0), (0.8, 1.25)  # of the training crops; conf/data/base.yaml has the same
MAX_TOKENS = 40

Epoch = Callable[[], Iterator[tuple[Tensor, int]]]


def open_csv(folder: Path, cores: int) -> Epoch:
    """data=csv, as conf/ has it."""
    return _ours(folder, cores, *table_overrides(folder))


def open_csv_full(folder: Path, cores: int) -> Epoch:
    """data=csv, every JPEG decoded at its full size."""
    return _ours(folder, cores, *table_overrides(folder), "data.scaled_decoding=false")


def open_shards(folder: Path, cores: int) -> Epoch:
    """data=webdataset, as conf/ has it: the .txt as the caption."""
    return _ours(folder, cores, *shards_overrides(folder))


def open_shards_json(folder: Path, cores: int) -> Epoch:
    """data=webdataset with all captions of the .json."""
    return _ours(folder, cores, *shards_overrides(folder), "data.caption_field=captions")


def table_overrides(folder: Path) -> tuple[str, ...]:
    files = f"data.table={folder}/captions.csv", f"data.image_dir={folder}/images"
    return "data=csv", *files, "data.check_images=false"


def shards_overrides(folder: Path) -> tuple[str, ...]:
    return "data=webdataset", f"data.shards={folder}/shards", "data.val_shards=null"


def data_module(workers: int, *overrides: str) -> Any:
    """A data module as train.py makes it."""
    import hydra

    from efficap.commands.entry import CONF, plain

    own = ["name=bench", "output_dir=unused", f"data.num_workers={workers}", f"data.batch_size={BATCH}"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.utils.instantiate(plain(hydra.compose("train", overrides=[*own, *overrides]))["data"])


def training_loader(data: Any, folder: Path, side: int = SIDE) -> Any:
    """What training is given by it."""
    from efficap.tokenizer import CaptionTokenizer

    tokenizer = CaptionTokenizer.load(folder / "tokenizer")
    data.prepare(tokenizer, image_size=side, interpolation="bicubic", crop_pct=1.0, splits=["train"])
    return data.train_dataloader()


def _ours(folder: Path, cores: int, *overrides: str) -> Epoch:
    loader = training_loader(data_module(cores, *overrides), folder)

    def epoch() -> Iterator[tuple[Tensor, int]]:
        for batch in loader:
            yield batch.images, int((batch.lengths > 0).sum())

    return epoch


def open_pil(folder: Path, cores: int, side: int = SIDE) -> Epoch:
    """A plain DataLoader with Pillow and Python lists, as one would write it."""
    import pandas as pd
    from torch.utils.data import DataLoader

    table = pd.read_csv(folder / "captions.csv").groupby("file_name", sort=False)["caption"].agg(list)
    encode = _encoder(folder)
    files = [folder / "images" / name for name in table.index]
    pictures = _Pictures(files, [encode(captions) for captions in table], side)
    loader: DataLoader[Any] = DataLoader(
        pictures,
        batch_size=BATCH,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
        collate_fn=_collate,
    )
    return lambda: _counted(loader)


class _Pictures(torch.utils.data.Dataset[Any]):
    def __init__(self, files: list[Path], captions: list[list[list[int]]], side: int) -> None:
        self.files, self.captions, self.transform = files, captions, _transform(side)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, list[list[int]]]:
        from PIL import Image

        return self.transform(Image.open(self.files[index]).convert("RGB")), self.captions[index]


def open_webdataset(folder: Path, cores: int) -> Epoch:
    """The webdataset library with Pillow, as its own documentation has it."""
    import webdataset as wds

    encode, transform = _encoder(folder), _transform(SIDE)
    tars = sorted(map(str, (folder / "shards").glob("*.tar")))
    samples = (
        wds.WebDataset(tars, shardshuffle=len(tars))
        .shuffle(200)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(transform, lambda fields: encode(fields["captions"]))
        .batched(BATCH, collation_fn=_collate)
    )
    loader = wds.WebLoader(samples, batch_size=None, num_workers=cores, persistent_workers=True)
    return lambda: _counted(loader)


def _transform(side: int) -> Any:
    from torchvision import transforms

    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [transforms.RandomResizedCrop(side, SCALE, RATIO, bicubic), transforms.PILToTensor()]
    )


def _encoder(folder: Path) -> Callable[[list[str]], list[list[int]]]:
    from efficap.tokenizer import CaptionTokenizer

    tokenizer = CaptionTokenizer.load(folder / "tokenizer")
    return lambda captions: tokenizer.encode(captions, MAX_TOKENS)[0]


def _collate(items: list[tuple[Tensor, list[list[int]]]]) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, S, S) pictures, (B * K, T) ids, (B * K,) lengths."""
    captions = [torch.tensor(ids) for _, of_picture in items for ids in of_picture]
    tokens = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    return torch.stack([picture for picture, _ in items]), tokens, torch.tensor([len(c) for c in captions])


def _counted(loader: Any) -> Iterator[tuple[Tensor, int]]:
    for images, _, lengths in loader:
        yield images, int((lengths > 0).sum())


def open_dali(folder: Path, cores: int) -> Epoch:
    """DALI's own webdataset reader and decoder, no crop, no tokenizer: what it does by itself."""
    return _bare(folder, cores, crop=False)


def open_dali_crop(folder: Path, cores: int) -> Epoch:
    """The same, with DALI's own random crop."""
    return _bare(folder, cores, crop=True)


def _bare(folder: Path, cores: int, crop: bool) -> Epoch:
    import nvidia.dali.types as types
    from nvidia.dali import fn, pipeline_def

    tars = sorted(map(str, (folder / "shards").glob("*.tar")))

    @pipeline_def(batch_size=BATCH, num_threads=cores, device_id=None, prefetch_queue_depth=2)
    def bare() -> Any:
        encoded, text = fn.readers.webdataset(paths=tars, ext=["jpg", "txt"], name="reader")
        if crop:
            part = {"random_area": SCALE, "random_aspect_ratio": RATIO}
            pictures = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB, **part)
        else:
            pictures = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        pictures = fn.resize(pictures, size=[SIDE, SIDE], interp_type=types.INTERP_CUBIC, antialias=True)
        return fn.transpose(pictures, perm=[2, 0, 1]), text

    pipeline = bare()
    pipeline.build()
    batches = -(-pipeline.reader_meta("reader")["epoch_size"] // BATCH)

    def epoch() -> Iterator[tuple[Tensor, int]]:
        for _ in range(batches):
            squares, text = pipeline.run()
            yield torch.from_numpy(squares.as_array()), sum(map(bool, text.shape()))

    return epoch


CONTENDERS: dict[str, Callable[[Path, int], Epoch]] = {
    "csv": open_csv,
    "pil": open_pil,
    "webdataset": open_shards,
    "dali": open_dali,
    "dali_crop": open_dali_crop,
    "webdataset_lib": open_webdataset,
    "csv_full": open_csv_full,
    "webdataset_json": open_shards_json,
}


def pin(cores: int) -> None:
    """Keep this process, and those it starts, to so many cores."""
    os.sched_setaffinity(0, set(itertools.islice(sorted(os.sched_getaffinity(0)), cores)))
