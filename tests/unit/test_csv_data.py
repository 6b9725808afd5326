"""The CSV data module: what it reads, what it yields, what it refuses."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import compose
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from efficap.data.csv import CSVDataModule
from efficap.data.dataset import SharedRows
from efficap.data.pictures import Picture, PictureError
from efficap.data.table import EmptyCaption, read_table
from efficap.data.transforms import EvaluationTransform, Resized, TrainingTransform
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
    return data


def picture_of(image: Image.Image, kind: str = "PNG", **options: Any) -> Picture:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return Picture(data.getvalue())


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


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
        for batch in loader.of_epoch(epoch):
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
    tables, _ = read_table(colour_table / "captions.csv", colour_table / "images", **COLUMNS)
    assert tables["train"].references == [["a red picture"]]


def test_a_caption_is_empty_where_cleaning_leaves_nothing_and_is_else_left_to_who_reads_it(
    colour_table: Path,
) -> None:
    rows = [
        (f"train_{number}.jpg", text, "train") for number, text in enumerate(["&nbsp;", "\u200b", "&amp;lt;"])
    ]
    tables, empties = read_table(table_with(colour_table, rows), colour_table / "images", **COLUMNS)
    assert tables["train"].references == [["&amp;lt;"]]
    assert empties == [EmptyCaption("train_0.jpg", "train", 1), EmptyCaption("train_1.jpg", "train", 2)]


def test_evaluation_follows_the_encoders_own_rule() -> None:
    """As torchvision does it with Pillow, whose own resampling is exact to one grey level."""
    image = noise(120, 90)
    actual = EvaluationTransform(image_size=40, interpolation="bicubic", crop_pct=0.8)(picture_of(image))
    resized = image.resize((66, 50), Image.Resampling.BICUBIC)  # short side 40 / 0.8
    expected = np.asarray(resized.crop((13, 5, 53, 45))).transpose(2, 0, 1)
    assert np.abs(actual.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("size", [(4000, 1), (1, 60_000), (65 * 3, 3)])
def test_a_picture_that_would_be_huge_once_its_short_side_is_resized_is_refused(
    size: tuple[int, int],
) -> None:
    transform = EvaluationTransform(image_size=40, interpolation="bicubic", crop_pct=1.0)
    picture = picture_of(Image.new("1", size))
    with pytest.raises(
        PictureError, match=rf"too narrow: {size[0]} x {size[1]} pixels, the limit is 64 to 1"
    ):
        transform(picture)


def test_a_picture_as_narrow_as_may_be_is_resized_and_cut() -> None:
    transform = EvaluationTransform(image_size=40, interpolation="bicubic", crop_pct=1.0)
    assert transform.cut(64 * 3, 3) == Resized(64 * 40, 40, 63 * 20, 0)
    assert transform(picture_of(noise(3, 64 * 3))).shape == (3, 40, 40)


def test_a_picture_that_is_too_narrow_to_be_evaluated_is_left_out_there_and_learned(
    colour_table: Path,
) -> None:
    for split in ("train", "val"):
        Image.new("RGB", (400, 1)).save(colour_table / "images" / f"{split}_3.jpg")
    data = data_module(colour_table, "data.max_bad_fraction=0.2")
    ids = [image_id for batch in data.train_dataloader() for image_id in batch.image_ids]
    assert sorted(ids) == [f"train_{n}.jpg" for n in range(8)]
    for _ in range(2):
        ids = [image_id for batch in data.val_dataloader() for image_id in batch.image_ids]
        assert ids == [f"val_{n}.jpg" for n in range(3)]
    assert data.bad_samples.counts == {"too narrow": 1}


def training_transform(**changes: Any) -> TrainingTransform:
    defaults = {"crop_scale": (0.3, 1), "crop_ratio": (0.8, 1.25), "flip": False, "scaled_decoding": True}
    return TrainingTransform(image_size=40, interpolation="bicubic", **{**defaults, **changes})


def test_a_training_crop_follows_from_its_seed() -> None:
    one, same, other = (
        training_transform(flip=True)(picture_of(noise(120, 90)), np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 9))
def test_a_crop_lies_within_the_picture_and_keeps_its_share_of_it(width: int, height: int, seed: int) -> None:
    crop = training_transform().cut(width, height, np.random.default_rng(seed))
    assert 0 <= crop.left < crop.left + crop.width <= width
    assert 0 <= crop.top < crop.top + crop.height <= height
    if min(width, height) > 50 and max(width, height) < 1.2 * min(width, height):
        assert 0.28 < crop.width * crop.height / (width * height) <= 1
        assert 0.78 < crop.width / crop.height < 1.28


def test_the_whole_picture_is_only_resized() -> None:
    image = noise(90, 90)
    whole = training_transform(crop_scale=(1, 1), crop_ratio=(1, 1))
    expected = np.asarray(image.resize((40, 40), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    pixels = whole(picture_of(image), np.random.default_rng(0)).numpy().astype(int)
    assert np.abs(pixels - expected).max() <= 1


def test_a_flip_mirrors_half_of_the_pictures() -> None:
    picture = picture_of(noise(60, 60))
    settings = {"crop_scale": (1, 1), "crop_ratio": (1, 1)}
    plain = training_transform(**settings)(picture, np.random.default_rng(0))
    flipped = [
        torch.equal(
            training_transform(flip=True, **settings)(picture, np.random.default_rng(seed)), plain.flip(2)
        )
        for seed in range(40)
    ]
    assert 10 < sum(flipped) < 30


@pytest.mark.parametrize(
    "changes", [{"crop_scale": (0.5, 1.5)}, {"crop_ratio": (2, 1)}, {"crop_scale": (0, 1)}]
)
def test_a_crop_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"data.{next(iter(changes))}="):
        training_transform(**changes)


def test_missing_and_broken_pictures_stop_the_training_with_their_names(colour_table: Path) -> None:
    images = colour_table / "images"
    whole = (images / "train_0.jpg").read_bytes()
    (images / "train_1.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "train_2.jpg").write_text("<html>not found</html>")
    (images / "train_3.jpg").unlink()
    with pytest.raises(InputError, match=r"3 \(.*\) of 12 samples cannot be used") as error:
        data_module(colour_table)
    message = str(error.value)
    assert "train_1.jpg (truncated" in message
    assert "train_2.jpg (no picture" in message
    assert "train_3.jpg (missing)" in message
    assert "train_0.jpg" not in message


def test_what_cannot_be_used_is_counted_of_the_splits_in_use_alone(colour_table: Path) -> None:
    table = pd.read_csv(colour_table / "captions.csv")
    table.loc[table["split"] == "test", "caption"] = ""
    table.loc[0, "caption"] = "&nbsp;"
    table.to_csv(colour_table / "captions.csv", index=False)
    data = data_module(colour_table, "data.max_bad_fraction=0.1")
    assert data.bad_samples.counts == {"empty caption": 1}
    assert data.bad_samples.total == 8 + 4 + 1
    with pytest.raises(
        InputError, match=r"data.test_split=test: .* has not one caption in that split; .*metrics=\[\]"
    ):
        data.split("test")
    with pytest.raises(InputError, match=r"1 \(empty caption 1\) of 9 samples cannot be used"):
        data_module(colour_table, "data.max_bad_fraction=0.1", splits=("train",))
    (colour_table / "captions.quarantine.csv").write_text("image,reason\ntrain_0.jpg,truncated\n")
    data = data_module(colour_table, splits=("train",))
    assert not data.bad_samples
    assert data.bad_samples.total == 7


def test_pictures_that_break_in_mid_training_are_left_out_or_named(colour_table: Path) -> None:
    for policy in ("skip", "raise"):
        data = data_module(colour_table, "data.max_bad_fraction=0.2", f"data.on_bad_sample={policy}")
        picture = colour_table / "images" / "train_3.jpg"
        whole = picture.read_bytes()
        picture.write_bytes(whole[:100])
        if policy == "raise":
            with pytest.raises(InputError, match=r"train_3.jpg \(.*data.on_bad_sample=skip"):
                list(data.train_dataloader())
        else:
            for _ in range(2):
                ids = [image_id for batch in data.train_dataloader() for image_id in batch.image_ids]
                assert sorted(ids) == [f"train_{n}.jpg" for n in (0, 1, 2, 4, 5, 6, 7)]
            assert data.bad_samples.counts.total() == 1, "counted once, however often it comes"
        picture.write_bytes(whole)


@pytest.mark.parametrize("places", [(0,), (5,), (7,), (0, 1, 7)])
def test_an_epoch_has_the_batches_that_its_length_says_though_nothing_is_left_of_some(
    places: tuple[int, ...], colour_table: Path
) -> None:
    data = data_module(colour_table, "data.max_bad_fraction=1", "data.batch_size=1")
    loader = data.train_dataloader()
    order = [batch.image_ids[0] for batch in loader.of_epoch(0)]
    for place in places:
        (colour_table / "images" / order[place]).write_bytes(b"")
    found = [batch.image_ids[0] for batch in loader.of_epoch(0)]
    assert len(found) == len(loader) == 8, "with the last of which Lightning validates"
    assert set(found) == {image_id for place, image_id in enumerate(order) if place not in places}
    if 7 in places:
        assert not list(loader.of_epoch(0, first=7)), "a training that is resumed there goes on"


def test_an_evaluation_passes_over_batches_of_which_nothing_is_left(colour_table: Path) -> None:
    data = data_module(colour_table, "data.max_bad_fraction=1", "data.batch_size=1")
    (colour_table / "images" / "val_2.jpg").write_bytes(b"")
    assert [batch.image_ids for batch in data.val_dataloader()] == [[f"val_{n}.jpg"] for n in (0, 1, 3)]


def test_data_of_which_nothing_can_be_used_are_refused(colour_table: Path) -> None:
    data = data_module(colour_table, "data.max_bad_fraction=1")
    for picture in (colour_table / "images").glob("train_*"):
        picture.write_bytes(b"")
    with pytest.raises(InputError, match=r"nothing of 2 batches can be used: 8 \(empty 8\)"):
        list(data.train_dataloader())


def test_too_many_that_break_in_mid_training_stop_it(colour_table: Path) -> None:
    data = data_module(colour_table, "data.max_bad_fraction=0.2", "data.num_workers=1")
    for picture in (colour_table / "images").glob("train_*"):
        picture.write_bytes(b"")
    with pytest.raises(InputError, match=r"4 \(empty 4\) of 12 samples cannot be used, more than"):
        list(data.train_dataloader())


def test_quarantined_pictures_are_left_out(colour_table: Path) -> None:
    (colour_table / "captions.quarantine.csv").write_text("image,reason\n./train_3.jpg ,truncated\n")
    (colour_table / "images" / "train_3.jpg").write_bytes(b"")
    data = data_module(colour_table)
    assert data.training_size == 7
    assert "1 pictures are in quarantine and left out" in data.notes()
    assert not data.bad_samples


def test_the_quarantine_of_each_table_of_a_mapping_counts_for_its_split(colour_table: Path) -> None:
    for split, part in pd.read_csv(colour_table / "captions.csv").groupby("split"):
        part.drop(columns="split").to_csv(colour_table / f"{split}.csv", index=False)
    (colour_table / "train.quarantine.csv").write_text(
        "image,reason\ntrain_3.jpg,truncated\ntest_1.jpg,missing\n"
    )
    data = data_module(
        colour_table, f"data.table={{train:{colour_table}/train.csv,val:{colour_table}/test.csv}}"
    )
    assert (len(data.split("train")), len(data.split("val"))) == (7, 4)


def test_a_split_that_is_in_quarantine_names_it(colour_table: Path) -> None:
    names = "".join(f"train_{number}.jpg,missing\n" for number in range(8))
    (colour_table / "captions.quarantine.csv").write_text(f"image,reason\n{names}")
    message = (
        r"has no picture in that split; .*: mend or remove \S+/captions.quarantine.csv \(8 pictures\), whose"
    )
    with pytest.raises(InputError, match=message):
        _ = data_module(colour_table).training_size


def test_captions_are_filtered_in_training_alone_and_counted(colour_table: Path) -> None:
    data = data_module(colour_table, "data.text.min_words=4", "data.text.exclude=grey")
    assert data.training_size == 6, "two of eight pictures are grey"
    assert set(data.training_captions()) == {f"all of it is {colour}" for colour in ("red", "green", "blue")}
    assert len(data.split("val").captions) == 8
    assert data.text.left_out == {"fewer than 4 words": 8, "matches grey": 2}


def test_an_attribute_is_read_from_the_file_of_its_split_alone(colour_table: Path) -> None:
    rows = pd.read_csv(colour_table / "captions.csv")
    for split, part in rows.groupby("split"):
        part = part.drop(columns="split")
        part = part.assign(domain=split + part["file_name"]) if split == "test" else part
        part.to_csv(colour_table / f"{split}.csv", index=False)
    files = ",".join(
        f"{key}:{colour_table}/{split}.csv" for key, split in (("train", "train"), ("dev", "test"))
    )
    data = data_module(colour_table, f"data.table={{{files}}}", "data.test_split=dev", splits=("train",))
    domains = {f"test_{n}.jpg": f"testtest_{n}.jpg" for n in range(4)}
    assert data.attribute("test", "domain") == data.attribute("dev", "domain") == domains
    with pytest.raises(InputError, match=r"train.csv has no column 'domain'"):
        data.attribute("train", "domain")


def test_a_reference_stays_a_reference_where_the_training_split_is_evaluated(colour_table: Path) -> None:
    filters = ["data.text.min_words=4", "data.text.exclude=grey"]
    data, whole = data_module(colour_table, *filters), data_module(colour_table)
    assert {image_id for batch in data.train_dataloader() for image_id in batch.image_ids} == {
        f"train_{n}.jpg" for n in (0, 1, 2, 4, 5, 6)
    }
    pairs = zip(data.evaluation_dataloader("train"), whole.evaluation_dataloader("train"), strict=True)
    for batch, expected in pairs:
        assert batch.image_ids == expected.image_ids
        assert batch.references == expected.references
        assert torch.equal(batch.images, expected.images)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has a header but no rows"),
        ([("", "a word", "train")], "1 of 1 rows have an empty file_name, the first is row 1"),
        ([("x.jpg", "a", "train"), ("x.jpg", "b", "val")], "x.jpg is in two splits"),
        ([("x.jpg", "a", "train"), ("./x.jpg", "b", "val")], "x.jpg is in two splits"),
        ([("x.jpg", "a", "train"), ("X.jpg", "b", "train")], "x.jpg and X.jpg differ only in case"),
        ([("../x.jpg", "a", "train")], r"../x.jpg lies outside data.image_dir; data.allow_absolute=true"),
        ([("a/../../x.jpg", "a", "train")], r"x.jpg lies outside data.image_dir"),
        ([("/etc/x.jpg", "a", "train")], r"/etc/x.jpg lies outside data.image_dir"),
        ([("..", "a", "train")], r"\.\. lies outside data.image_dir"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(
    colour_table: Path, rows: list[tuple[str, str, str]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read_table(table_with(colour_table, rows), colour_table / "images", **COLUMNS)


@pytest.mark.parametrize("name", ["...and more.jpg", "..a/x.jpg"])
def test_a_name_that_begins_with_dots_lies_in_the_folder(colour_table: Path, name: str) -> None:
    tables, _ = read_table(
        table_with(colour_table, [(name, "a", "train")]), colour_table / "images", **COLUMNS
    )
    assert tables["train"].image_ids == [name]


def test_a_missing_column_names_those_that_there_are(colour_table: Path) -> None:
    with pytest.raises(
        InputError, match=r"no column 'text', only 'file_name', 'caption', 'split'; name it with"
    ):
        read_table(
            colour_table / "captions.csv", colour_table / "images", **{**COLUMNS, "caption_column": "text"}
        )


def test_pictures_without_captions_are_for_captioning_alone(colour_table: Path) -> None:
    with pytest.raises(InputError, match=r"data.require_captions=false is for captioning alone"):
        data_module(colour_table, "data.require_captions=false")
    data_module(colour_table, "data.require_captions=false", splits=("train",))


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file has a name until its process ends")
def test_the_rows_that_loaders_share_leave_no_file_behind_and_are_read_by_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    rows = SharedRows(pa.table({"words": ["red", "green", "blue"]}))
    assert not list(tmp_path.iterdir())
    read = "import pickle, sys; print(pickle.load(sys.stdin.buffer)['words', 2])"
    loader = subprocess.run(
        [sys.executable, "-c", read], input=pickle.dumps(rows), capture_output=True, check=True
    )
    assert loader.stdout == b"blue\n"
