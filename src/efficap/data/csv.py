"""Pictures in a folder, captions in a table: the data module for a user's own data, and for COCO and Flickr."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader

from efficap.data.attributes import coco_ids, read_attribute
from efficap.data.dataset import CaptionedImages, SharedRows, encode_table
from efficap.data.features import FeatureMaps
from efficap.data.loader import CheckedLoader
from efficap.data.module import CaptionDataModule
from efficap.data.order import BatchOrder, EvaluationOrder, Shuffled
from efficap.data.pictures import Picture, PictureError
from efficap.data.pool import tracked
from efficap.data.quarantine import own_quarantine, read_quarantine
from efficap.data.table import CaptionTable, EmptyCaption, read_table
from efficap.data.transforms import EvaluationTransform, TrainingTransform
from efficap.errors import InputError
from efficap.ranks import gathered, rank, world_size


class CSVDataModule(CaptionDataModule):
    """Loaders of `CaptionBatch` over the splits of a caption table.

    Args:
        table: a CSV, TSV or Parquet with a row for each caption, COCO's or Karpathy's JSON, Flickr's token file; or a
            mapping of splits to such files.
        image_dir: what the picture names in it are relative to.
        allow_absolute: whether they may lie outside it.
        image_column, caption_column, split_column: names of its columns; None for no captions.
        train_split, val_split, test_split: its names of the splits.
        quarantine: a CSV of pictures to leave out, as the doctor writes it; None takes ``<table>.quarantine.csv``, of
            each table, where that is there.
        check_images: decode every picture once before training.
        require_captions: False: pictures without captions stay, for captioning alone; not in training.
        common: the arguments of `CaptionDataModule`.
    """

    def __init__(
        self,
        *,
        table: str | Mapping[str, str],
        image_dir: str,
        allow_absolute: bool,
        image_column: str,
        caption_column: str | None,
        split_column: str,
        train_split: str,
        val_split: str,
        test_split: str,
        quarantine: str | None,
        check_images: bool,
        require_captions: bool = True,  # the runs of earlier versions do not have it
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.table: Path | dict[str, Path] = (
            Path(table).expanduser()
            if isinstance(table, str)
            else {split.strip(): Path(file).expanduser() for split, file in table.items()}
        )
        if isinstance(self.table, dict) and len(self.table) < len(table):
            raise InputError(f"data.table={table} names a split twice; give each one file")
        self.image_dir = Path(image_dir).expanduser()
        self.allow_absolute, self.check = allow_absolute, check_images
        self.require_captions = require_captions
        self.image_column = image_column
        self.columns: dict[str, Any] = {
            "image_column": image_column,
            "caption_column": caption_column,
            "split_column": split_column,
        }
        self.split_names = {"train": train_split, "val": val_split, "test": test_split}
        self.quarantine = Path(quarantine).expanduser() if quarantine is not None else None
        self.quarantined: Counter[str] = Counter()  # pictures, by the list that leaves them out
        self._splits: dict[str, CaptionTable] = {}
        self._empties: list[EmptyCaption] = []  # of all splits
        self._learned: CaptionTable | None = None  # of the prepared training split
        self._rows: dict[str, SharedRows] = {}
        self._files: dict[str, dict[str, Path]] = {}
        self._features: dict[str, FeatureMaps] = {}

    def split(self, name: str) -> CaptionTable:
        """The table of ``train``, ``val``, ``test``, or of any split by the table's own name for it.

        Raises:
            InputError: the table has no such split, or no caption in it.
        """
        if not self._splits:
            self._read()
        in_table = self.split_names.get(name, name)
        if in_table not in self._splits:
            sizes = ", ".join(f"{split} ({len(table)} pictures)" for split, table in self._splits.items())
            setting = f"data.{name}_split={in_table}" if name in self.split_names else f"split={name}"
            if any(empty.split == in_table for empty in self._empties):
                raise InputError(
                    f"{setting}: {self.table} has not one caption in that split; eval.py captions its pictures without "
                    "scores: metrics=[]"
                )
            choose = (
                f"data.{name}_split=NAME or, in eval.py, split=NAME"
                if name in self.split_names
                else "split=NAME"
            )
            if self.quarantined:
                lists = ", ".join(f"{file} ({count:,} pictures)" for file, count in self.quarantined.items())
                choose = f"mend or remove {lists}, whose pictures are left out; {choose}"
            raise InputError(
                f"{setting}: {self.table} has no picture in that split; it has {sizes or 'none'}: {choose} chooses one "
                "of these"
            )
        return self._splits[in_table]

    def _read(self) -> None:
        tables, empties = read_table(
            self.table,
            self.image_dir,
            **self.columns,
            text=self.text,
            allow_absolute=self.allow_absolute,
            require_captions=self.require_captions,
        )
        for split, table in tables.items():
            if file := self.quarantine or own_quarantine(self.table, split):
                left_out, whole = read_quarantine(file), len(table)
                table = table.without(left_out)
                empties = [
                    empty for empty in empties if empty.split != split or empty.image_id not in left_out
                ]
                if len(table) < whole:
                    self.quarantined[f"{file}"] += whole - len(table)
            if len(table):
                self._splits[split] = table
        self._empties = empties

    def in_training(self, split: str) -> CaptionTable:
        """A split as a training has it: once prepared, ``train`` holds only what is learned, all others are whole."""
        return self._learned if split == "train" and self._learned is not None else self.split(split)

    def training_captions(self) -> Iterable[str]:
        return self.in_training("train").captions

    @property
    def training_size(self) -> int:
        return len(self.in_training("train"))

    def _prepare_splits(self, splits: list[str]) -> None:
        if not self.require_captions and "train" in splits and len(splits) > 1:
            raise InputError(
                "data.require_captions=false is for captioning alone: training and validation need captions; leave it "
                "out, and pictures without are left out (data.max_bad_fraction says how many at most)"
            )
        for name in splits:
            table = self.split(name)
            empties = [empty for empty in self._empties if empty.split == table.split]
            self.bad_samples.total += len(table) + len(empties)
            for empty in empties:
                self.bad_samples.add(f"row {empty.row} of {self.table}, {empty.image_id}", "empty caption")
            if self.check:
                table = self._checked(table)
            self._splits[table.split] = table
            if name == "train":
                self._learned = self._learnable(table)
            if not len(self.in_training(name)):
                raise InputError(f"{self.table}: nothing is left of the split {table.split}; {self._why()}")
        self.bad_samples.check()
        for name in splits:
            self._rows[name], cut = encode_table(self.in_training(name), self.tokenizer, self.max_tokens)
            self.cut_captions += cut

    def _why(self) -> str:
        return "; ".join(self.notes()) or "it has no picture"

    def _checked(self, table: CaptionTable) -> CaptionTable:
        """The table without the pictures that cannot be decoded; each process looks at its share of them."""

        def why_bad(file: Path) -> PictureError | None:
            try:
                picture = Picture(file, self.max_pixels, timeout=self.read_timeout)
                picture.pixels(at_least=1)  # JPEGs at an eighth of their size
            except PictureError as error:
                return error
            return None

        mine = slice(rank(), None, world_size())
        files = table.files[mine]
        found: list[tuple[int, str, str, str]] = []
        with ThreadPoolExecutor() as threads:
            reasons = tracked(threads.map(why_bad, files), f"Checking {table.split}", len(files))
            for place, file, error in zip(range(len(table))[mine], files, reasons, strict=True):
                if error is not None:
                    found.append((place, str(file), error.reason, error.detail))
        bad = sorted(itertools.chain(*gathered(found)))
        for _, name, reason, detail in bad:
            self.bad_samples.add(name, reason, detail)
        image_ids = table.image_ids if bad else []
        return table.without({image_ids[place] for place, *_ in bad}) if bad else table

    def _learnable(self, table: CaptionTable) -> CaptionTable:
        """The table with the captions that training learns from, and without pictures that have none."""
        references = table.references
        chosen, left_out = [], Counter[str]()
        for captions in references:
            numbers, others = self.text.learnable(captions)
            chosen.append([captions[n] for n in numbers])
            left_out.update(others)
        if not left_out:
            return table
        self.text.left_out.update(left_out)
        kept = [row for row in zip(table.image_ids, table.files, chosen, strict=True) if row[2]]
        image_ids, files = [row[0] for row in kept], [row[1] for row in kept]
        return CaptionTable.of(table.split, image_ids, files, [row[2] for row in kept])

    def notes(self) -> list[str]:
        lines = super().notes()
        if self.quarantined:
            lines.append(f"{self.quarantined.total():,} pictures are in quarantine and left out")
        if self._features:
            lines.append(
                "training reads cached features of central crops: data.crop_scale, crop_ratio and scaled_decoding "
                "are not used"
            )
        return lines

    @property
    def feature_cache_dir(self) -> Path:
        """Where feature maps are kept, a folder for each encoder: beside the table where no place was given."""
        table = self.table if isinstance(self.table, Path) else next(iter(self.table.values()))
        return self.cache_dir or table.parent / ".features"

    def use_features(self, split: str, maps: FeatureMaps) -> None:
        """Let the batches of a prepared split hold these maps in place of pixels, in the order of `in_training`."""
        self._features[split] = maps

    def picture(self, split: str, image_id: str) -> Path | Image.Image:
        if split not in self._files:
            table = self.split(split)
            self._files[split] = dict(zip(table.image_ids, table.files, strict=True))
        return self._files[split][image_id]

    def attribute(self, split: str, name: str) -> dict[str, str]:
        table, files = self.split(split), self.table
        if isinstance(files, dict):  # those of other splits need not have it
            files = {key: file for key, file in files.items() if key == table.split}
        values = read_attribute(files, self.image_dir, name, self.image_column)
        return {image_id: values[image_id] for image_id in table.image_ids}

    def coco_ids(self) -> dict[str, int]:
        return coco_ids(self.table, self.image_dir)

    def train_dataloader(self) -> CheckedLoader:
        order = self._training_order(Shuffled(len(self._rows["train"]), self.seed))
        return self._loader(self._rows["train"], self._features.get("train"), self.training_transform, order)

    def evaluation_dataloader(self, split: str) -> CheckedLoader:
        rows, features = self._rows[split], self._features.get(split)
        table = self.split(split)
        if self.in_training(split) is not table:  # a caption that is not learned stays a reference
            rows, _ = encode_table(table, self.tokenizer, self.max_tokens)
            features = None  # they are of the pictures that are learned
        return self._loader(rows, features, self.evaluation_transform, self._evaluation_order(len(rows)))

    def _loader(
        self,
        rows: SharedRows,
        features: FeatureMaps | None,
        transform: TrainingTransform | EvaluationTransform,
        order: BatchOrder | EvaluationOrder,
    ) -> CheckedLoader:
        images = CaptionedImages(
            rows,
            transform,
            captions_per_image=self.captions_per_image,
            max_pixels=self.max_pixels,
            seed=self.seed,
            pad_id=self.tokenizer.pad_id,
            features=features,
            read_timeout=self.read_timeout,
        )
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.device.type == "cuda",
            collate_fn=images.collate,
        )
        return self._checked_loader(loader, order)
