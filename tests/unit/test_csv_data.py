"""The CSV data module: what it reads, what it yields, what it refuses."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from efficap.data.csv import CSVDataModule
from efficap.data.table import check_images, read_table
from efficap.data.transforms import EvaluationTransform, TrainingTransform, load_rgb
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer

COLUMNS = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}


def data_module(folder: Path, *overrides: str, splits: tuple[str, ...] = ("train", "val")) -> CSVDataModule:
    arguments: dict[str, Any] = compose(
        "train",
        "data=csv",
        "name=test",
        "output_dir=unused",
        f"data.table={folder}/captions.csv",
        f"data.image_dir={folder}/images",
        "data.num_workers=0",
        "data.batch_size=4",
        *overrides,
    )["data"]
    arguments.pop("_target_")
    data = CSVDataModule(**arguments)
    tokenizer = CaptionTokenizer.learn(data.split("train").captions, 300)
    data.prepare(tokenizer, image_size=64, interpolation="bicubic", crop_pct=1.0, splits=list(splits))
    data.tokenizer = tokenizer  # for the tests alone
    return data


def table_with(folder: Path, rows: list[tuple[str, str, str]]) -> Path:
    pd.DataFrame(rows, columns=["file_name", "caption", "split"]).to_csv(folder / "captions.csv", index=False)
    return folder / "captions.csv"


def test_a_batch_keeps_the_contract(colour_table: Path) -> None:
    table = pd.read_csv(colour_table / "captions.csv")
    table = pd.concat([table, table[table["file_name"] == "train_0.jpg"].head(1)])  # a third caption
    table.to_csv(colour_table / "captions.csv", index=False)
    data = data_module(colour_table, "data.captions_per_image=3", "data.batch_size=8")
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (8, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.tokens.shape[:2] == batch.lengths.shape == (8, 3)
    assert batch.references is None
    assert (batch.lengths[:, 2] > 0).tolist() == [image_id == "train_0.jpg" for image_id in batch.image_ids]
    for tokens, length in zip(batch.tokens[:, 0], batch.lengths[:, 0], strict=True):
        assert tokens[0] == data.tokenizer.bos_id
        assert tokens[length - 1] == data.tokenizer.eos_id


def test_captions_stay_with_their_picture(colour_table: Path) -> None:
    data = data_module(colour_table)
    for batch in data.train_dataloader():
        for pixels, tokens in zip(batch.images, batch.tokens[:, 0].tolist(), strict=True):
            mean = pixels.float().mean(dim=(1, 2))
            bright = int(mean.argmax())
            word = ["red", "green", "blue"][bright] if mean.max() - mean.min() > 50 else "grey"
            assert word in data.tokenizer.decode(tokens)


def test_every_picture_comes_once_an_epoch_and_the_order_follows_from_the_seed(colour_table: Path) -> None:
    def order(*overrides: str) -> list[str]:
        loader = data_module(colour_table, *overrides).train_dataloader()
        return [image_id for batch in loader for image_id in batch.image_ids]

    assert sorted(order()) == [f"train_{n}.jpg" for n in range(8)]
    assert order() == order()
    assert order() != order("seed=1")


def test_fewer_captions_than_there_are_go_round_over_the_epochs(colour_table: Path) -> None:
    data = data_module(colour_table, "data.captions_per_image=1")
    loader = data.train_dataloader()
    seen: Counter[tuple[str, str]] = Counter()
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for image_id, tokens in zip(batch.image_ids, batch.tokens[:, 0].tolist(), strict=True):
                seen[image_id, data.tokenizer.decode(tokens)] += 1
    assert len(seen) == 16, "8 pictures with 2 captions"
    assert set(seen.values()) == {2}


def test_loader_processes_yield_the_same_batches(colour_table: Path) -> None:
    one, other = (list(data_module(colour_table, f"data.num_workers={n}").train_dataloader()) for n in (0, 2))
    for a, b in zip(one, other, strict=True):
        assert a.image_ids == b.image_ids
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)


def test_validation_has_every_reference_and_every_picture_in_order(colour_table: Path) -> None:
    data = data_module(colour_table, "data.batch_size=3")
    batches = list(data.val_dataloader())
    assert [image_id for batch in batches for image_id in batch.image_ids] == [
        f"val_{n}.jpg" for n in range(4)
    ]
    assert batches[0].references is not None
    assert batches[0].references[0] == ["a red picture", "all of it is red"]


def test_cut_captions_are_counted(colour_table: Path) -> None:
    assert data_module(colour_table, "data.max_tokens=4").cut_captions > 0
    assert data_module(colour_table, "data.max_tokens=40").cut_captions == 0


def test_columns_and_splits_may_have_other_names(colour_table: Path) -> None:
    table = pd.read_csv(colour_table / "captions.csv")
    table.columns = ["picture", "text", "part"]
    table["part"] = table["part"].replace({"val": "dev"})
    table.to_csv(colour_table / "captions.csv", index=False)
    names = ["image_column=picture", "caption_column=text", "split_column=part", "val_split=dev"]
    data = data_module(colour_table, *(f"data.{name}" for name in names))
    assert len(data.split("val")) == 4


def test_white_space_in_captions_is_collapsed(colour_table: Path) -> None:
    table_with(colour_table, [("train_0.jpg", " a\u2028red \r\n\x0b picture ", "train")])
    tables = read_table(colour_table / "captions.csv", colour_table / "images", **COLUMNS)
    assert tables["train"].references == [["a red picture"]]


def test_evaluation_follows_the_encoders_own_rule() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    actual = EvaluationTransform(image_size=40, interpolation="bicubic", crop_pct=0.8)(image)
    resized = image.resize((66, 50), Image.Resampling.BICUBIC)  # short side 40 / 0.8
    expected = np.asarray(resized.crop((13, 5, 53, 45))).transpose(2, 0, 1)
    assert np.array_equal(actual.numpy(), expected)


def training_transform(**changes: Any) -> TrainingTransform:
    defaults = {"crop_scale": (0.3, 1), "crop_ratio": (0.8, 1.25), "flip": False}
    return TrainingTransform(image_size=40, interpolation="bicubic", **{**defaults, **changes})


def test_a_training_crop_follows_from_its_seed() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    one, same, other = (
        training_transform(flip=True)(image, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_a_crop_lies_within_the_picture_and_keeps_its_share_of_it(width: int, height: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, top, right, bottom = training_transform().crop_box(width, height, rng)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 50 and max(width, height) < 1.2 * min(width, height):
        assert 0.28 < (right - left) * (bottom - top) / (width * height) <= 1
        assert 0.78 < (right - left) / (bottom - top) < 1.28


def test_the_whole_picture_is_only_resized() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    pixels = training_transform(crop_scale=(1, 1), crop_ratio=(1, 1))(image, np.random.default_rng(0))
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize(
    "changes", [{"crop_scale": (0.5, 1.5)}, {"crop_ratio": (2, 1)}, {"crop_scale": (0, 1)}]
)
def test_a_crop_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"data.{next(iter(changes))}="):
        training_transform(**changes)


def test_pictures_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(load_rgb(tmp_path / "turned.png"))
    assert upright.shape == (40, 20, 3)
    assert upright[:20].min() == 255, "white is now above"
    Image.new("LA", (8, 8)).save(tmp_path / "grey.png")
    assert load_rgb(tmp_path / "grey.png").mode == "RGB"


def test_missing_and_broken_pictures_are_named_up_to_ten(colour_table: Path) -> None:
    images = colour_table / "images"
    whole = (images / "train_0.jpg").read_bytes()
    (images / "train_1.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "train_2.jpg").write_text("<html>not found</html>")
    missing = [images / f"gone_{n}.jpg" for n in range(12)]
    files = [images / "train_0.jpg", images / "train_1.jpg", images / "train_2.jpg", *missing]
    with pytest.raises(InputError, match="14 of 15 pictures are missing or unreadable") as error:
        check_images(files)
    message = str(error.value)
    assert "train_1.jpg" in message
    assert "train_2.jpg" in message
    assert "gone_7.jpg (missing) and 4 more" in message
    assert "train_0.jpg" not in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has a header but no rows"),
        ([("train_0.jpg", "  ", "train")], "1 of 1 rows have an empty caption, the first in row 2"),
        ([("", "a word", "train")], "1 of 1 rows have an empty file_name"),
        ([("x.jpg", "a", "train"), ("x.jpg", "b", "val")], "x.jpg is in two splits"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    colour_table: Path, rows: list[tuple[str, str, str]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_table(table_with(colour_table, rows), colour_table / "images", **COLUMNS)


def test_a_missing_column_names_those_that_there_are(colour_table: Path) -> None:
    with pytest.raises(
        InputError, match=r"no column 'text', only 'file_name', 'caption', 'split'; name it with"
    ):
        read_table(
            colour_table / "captions.csv", colour_table / "images", **{**COLUMNS, "caption_column": "text"}
        )


def test_a_missing_table_or_folder_is_named(colour_table: Path) -> None:
    with pytest.raises(InputError, match=r"data.table=.*none.csv does not exist"):
        read_table(colour_table / "none.csv", colour_table, **COLUMNS)
    with pytest.raises(InputError, match=r"data.image_dir=.*none is no directory"):
        read_table(colour_table / "captions.csv", colour_table / "none", **COLUMNS)


def test_an_empty_split_names_those_that_there_are(colour_table: Path) -> None:
    table = pd.read_csv(colour_table / "captions.csv")
    table[table["split"] == "train"].to_csv(colour_table / "captions.csv", index=False)
    with pytest.raises(InputError, match=r"data.val_split=val: .* it has train \(8 pictures\)"):
        data_module(colour_table)


@pytest.mark.parametrize("setting", ["captions_per_image", "batch_size", "max_tokens"])
def test_a_size_of_zero_is_refused(colour_table: Path, setting: str) -> None:
    with pytest.raises(InputError, match=f"data.{setting}=0 must be at least"):
        data_module(colour_table, f"data.{setting}=0")
