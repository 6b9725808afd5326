"""`python -m efficap.data.shards`: a table's pictures and captions as tars, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from tars import ThisProcess, encoded, indexed, scenery

from efficap.data import pool
from efficap.data.shards import writer
from efficap.data.shards.__main__ import main
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import CaptionTable, read_table
from efficap.errors import InputError
from efficap.picture_files import MAX_PIXELS

SETTINGS = ShardSettings(samples_per_shard=3, short_side=None, max_pixels=MAX_PIXELS)
COLUMNS = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}


@pytest.fixture(autouse=True)
def _in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "processes" not in request.node.name:
        monkeypatch.setattr(pool, "ProcessPoolExecutor", ThisProcess)


@pytest.fixture
def table(colour_table: Path) -> CaptionTable:
    tables, _ = read_table(colour_table / "captions.csv", colour_table / "images", **COLUMNS)
    return tables["train"]


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        return {name: file.read() for name, file in files.items() if file is not None}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(folder: Path, out: Path, *options: str) -> int:
    return main([f"{folder}/captions.csv", f"{folder}/images", str(out), "--workers", "1", *options])


def test_tars_hold_each_picture_unchanged_with_all_its_captions(
    table: CaptionTable, colour_table: Path, tmp_path: Path
) -> None:
    assert write_shards(table, tmp_path / "out", SETTINGS, 1) == {"success": 8}
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert [tar.name for tar in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    found = []
    for tar, count in zip(tars, (3, 3, 2), strict=True):
        content = members(tar)
        keys = [f"{tar.stem}{row}" for row in range(count)]
        assert list(content) == [f"{key}.{suffix}" for key in keys for suffix in ("jpg", "txt", "json")]
        for key in keys:
            fields = json.loads(content[f"{key}.json"])
            name = fields["image_id"]
            found.append(name)
            assert content[f"{key}.jpg"] == (colour_table / "images" / name).read_bytes()
            assert content[f"{key}.txt"].decode() == fields["caption"] == fields["captions"][0]
            assert (fields["key"], fields["width"], fields["height"]) == (key, 80, 72)
            assert fields["captions"] == table.references[table.image_ids.index(name)]
            assert len(fields["captions"]) == 2
        stats = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text())
        assert (stats["count"], stats["successes"]) == (count, count)
    assert found == table.image_ids


def test_what_is_written_can_be_read(table: CaptionTable, tmp_path: Path) -> None:
    write_shards(table, tmp_path, SETTINGS, 1)
    reader = indexed(sorted(tmp_path.glob("*.tar")), caption_field="captions")
    samples = [reader.read(n) for n in range(len(reader))]
    assert [sample.image_id for sample in samples] == table.image_ids
    assert [sample.captions for sample in samples] == table.references


def test_any_number_of_processes_writes_identical_bytes(
    table: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(table, tmp_path / "a", SETTINGS, 2)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", ThisProcess)
    write_shards(table, tmp_path / "b", SETTINGS, 1)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert len(snapshot(tmp_path / "a")) == 7


def test_a_run_that_was_stopped_goes_on_and_keeps_what_is_complete(
    table: CaptionTable, tmp_path: Path
) -> None:
    write_shards(table, tmp_path, SETTINGS, 1)
    whole = snapshot(tmp_path)
    (tmp_path / "00001_stats.json").unlink()  # as if killed between the tar and its statistics
    (tmp_path / "00001.tar").write_bytes(b"half")
    (tmp_path / "00002.tar").unlink()
    kept = (tmp_path / "00000.tar").stat()
    assert write_shards(table, tmp_path, SETTINGS, 1) == {"success": 8}
    assert snapshot(tmp_path) == whole
    assert (tmp_path / "00000.tar").stat().st_ino == kept.st_ino, "not written again"
    assert (tmp_path / "00000.tar").stat().st_mtime_ns == kept.st_mtime_ns


def test_a_tar_appears_when_it_is_complete(
    table: CaptionTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = writer._encoded, []

    def interrupted(file: Path, settings: ShardSettings) -> Any:
        seen.append(file)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return read(file, settings)

    monkeypatch.setattr(writer, "_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shards(table, tmp_path / "out", SETTINGS, 1)
    assert sorted(os.listdir(tmp_path / "out")) == ["00000.tar", "00000_stats.json", "shards.json"]
    assert write_shards(table, tmp_path / "out", SETTINGS, 1) == {"success": 8}
    assert len(seen) == 4 + 1 + 5, "the first tar was not read again"


@pytest.mark.parametrize(
    "other",
    [
        ShardSettings(4, None, MAX_PIXELS),
        ShardSettings(3, 64, MAX_PIXELS),
        ShardSettings(3, None, 100),
    ],
)
def test_other_settings_are_refused_in_the_same_folder(
    other: ShardSettings, table: CaptionTable, tmp_path: Path
) -> None:
    write_shards(table, tmp_path, SETTINGS, 1)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"holds shards written with .* is asked for; name another folder"):
        write_shards(table, tmp_path, other, 1)
    with pytest.raises(InputError, match=r"holds shards written with"):
        write_shards(table.without({"train_0.jpg"}), tmp_path, SETTINGS, 1)
    assert snapshot(tmp_path) == before


def test_another_table_of_as_many_pictures_is_refused_in_the_same_folder(
    table: CaptionTable, tmp_path: Path
) -> None:
    write_shards(table, tmp_path, SETTINGS, 1)
    (tmp_path / "00001.tar").unlink()
    captions = [[caption.upper() for caption in of_image] for of_image in table.references]
    other = CaptionTable.of("train", table.image_ids, table.files, captions)
    with pytest.raises(InputError, match=r"holds shards written with"):
        write_shards(other, tmp_path, SETTINGS, 1)


def test_tars_of_another_origin_are_not_mixed_with(table: CaptionTable, tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"someone else's")
    with pytest.raises(InputError, match=r"holds tars of another origin"):
        write_shards(table, tmp_path, SETTINGS, 1)
    assert (tmp_path / "00000.tar").read_bytes() == b"someone else's"


def test_broken_pictures_are_left_out_and_counted(
    table: CaptionTable, colour_table: Path, tmp_path: Path
) -> None:
    images = colour_table / "images"
    whole = (images / "train_1.jpg").read_bytes()
    (images / "train_1.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "train_2.jpg").write_text("<html>")
    (images / "train_3.jpg").unlink()
    (images / "train_4.jpg").write_bytes(b"")
    outcome = write_shards(table, tmp_path / "out", SETTINGS, 1)
    assert outcome == {"success": 4, "truncated": 1, "no picture": 1, "missing": 1, "empty": 1}
    assert write_shards(table, tmp_path / "out", SETTINGS, 1) == outcome, "as it was counted"
    reader = indexed(sorted((tmp_path / "out").glob("*.tar")))
    assert [reader.image_id(n) for n in range(len(reader))] == [f"train_{n}.jpg" for n in (0, 5, 6, 7)]
    stats = json.loads((tmp_path / "out/00001_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["failed_to_download"]) == (3, 1, 1)


def pictures(folder: Path, files: dict[str, bytes]) -> CaptionTable:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return CaptionTable.of("train", list(files), [folder / name for name in files], [["x"] for _ in files])


def test_a_short_side_makes_larger_pictures_smaller_and_copies_the_others(tmp_path: Path) -> None:
    large, small = Image.fromarray(scenery(300, 200)), Image.fromarray(scenery(64, 48))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "large.png": encoded(large, "PNG"),
        "small.png": encoded(small, "PNG"),
        "turned.jpg": encoded(large, exif=turned),
        "odd.ppm": encoded(small, "PPM"),
    }
    table = pictures(tmp_path / "images", files)
    write_shards(table, tmp_path / "out", ShardSettings(9, 50, MAX_PIXELS), 1)
    content = members(tmp_path / "out" / "00000.tar")
    suffixes = Counter(name.rpartition(".")[2] for name in content)
    assert suffixes == {"txt": 4, "json": 4, "jpg": 3, "png": 1}
    assert content["000001.png"] == files["small.png"], "as it is"
    for name, size in (("000000.jpg", (75, 50)), ("000002.jpg", (50, 75)), ("000003.jpg", (64, 48))):
        with Image.open(io.BytesIO(content[name])) as image:
            fields = json.loads(content[name.replace("jpg", "json")])
            assert image.size == (fields["width"], fields["height"]) == size
            assert image.format == "JPEG"
            assert image.getexif().get(0x0112, 1) == 1, "upright"


def test_a_picture_too_long_for_a_jpeg_is_left_out_and_the_others_are_written(tmp_path: Path) -> None:
    files = {
        "long.png": encoded(Image.new("1", (70_000, 60)), "PNG"),
        "row.png": encoded(Image.new("1", (4000, 1)), "PNG"),
        "row.ppm": encoded(Image.new("1", (4000, 1)), "PPM"),
        "large.png": encoded(Image.fromarray(scenery(300, 200)), "PNG"),
    }
    table = pictures(tmp_path / "images", files)
    outcome = write_shards(table, tmp_path / "out", ShardSettings(9, 58, MAX_PIXELS), 1)
    assert outcome == {"success": 3, "too narrow": 1}
    reader = indexed(tmp_path / "out" / "00000.tar")
    assert [reader.image_id(n) for n in range(len(reader))] == ["row.png", "row.ppm", "large.png"]


def test_files_are_copied_whatever_they_are_called(tmp_path: Path) -> None:
    small = Image.fromarray(scenery(64, 48))
    kinds = {"PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "JPEG": "jpg"}
    files = {f"{kind}.jpg": encoded(small, kind) for kind in kinds}
    write_shards(
        pictures(tmp_path / "images", files), tmp_path / "out", ShardSettings(9, None, MAX_PIXELS), 1
    )
    content = members(tmp_path / "out" / "00000.tar")
    for row, (kind, suffix) in enumerate(kinds.items()):
        assert content[f"00000{row}.{suffix}"] == files[f"{kind}.jpg"]
    assert len(indexed(tmp_path / "out" / "00000.tar")) == len(kinds)


def test_every_picture_that_a_table_may_have_comes_back_from_its_tar(tmp_path: Path) -> None:
    """Of a format that has no suffix among those that shards are read by."""
    small = Image.fromarray(scenery(64, 48))
    files = {
        "a.ppm": encoded(small, "PPM"),
        "b.tga": encoded(small, "TGA"),
        "c.jp2": encoded(small, "JPEG2000"),
    }
    outcome = write_shards(
        pictures(tmp_path / "images", files), tmp_path / "out", ShardSettings(9, None, MAX_PIXELS), 1
    )
    assert outcome == {"success": 3}
    assert len(indexed(tmp_path / "out" / "00000.tar")) == 3


def test_the_command_writes_a_folder_a_split_and_says_how_to_train(
    colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.read_csv(colour_table / "captions.csv")
    rows.loc[len(rows)] = ["train_0.jpg", "", "train"]
    rows.to_csv(colour_table / "captions.csv", index=False)
    (colour_table / "images" / "val_1.jpg").write_bytes(b"")
    assert run(colour_table, tmp_path / "out", "--samples-per-shard", "5") == 0
    printed = capsys.readouterr().out
    assert "train: 8 pictures\nval: 3 pictures; left out: empty 1\ntest: 4 pictures\n" in printed
    assert "1 rows without a caption left out" in printed
    folders = [f"data.{name}={tmp_path}/out/{split}" for name, split in (
        ("shards", "train"), ("val_shards", "val"), ("test_shards", "test"))]  # fmt: skip
    command = ["python train.py model=small data=webdataset", *folders, "data.caption_field=captions"]
    assert printed.endswith(f"Train with:\n{' '.join(command)}\n")
    found = {str(tar.relative_to(tmp_path / "out")) for tar in (tmp_path / "out").rglob("*.tar")}
    assert found == {"train/00000.tar", "train/00001.tar", "val/00000.tar", "test/00000.tar"}


def test_the_command_leaves_out_what_is_in_quarantine_and_tells(
    colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quarantine = colour_table / "captions.quarantine.csv"
    quarantine.write_text("image,reason\ntrain_3.jpg,the same as test_0.jpg in test\n")
    assert run(colour_table, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert f"train: 1 pictures in {quarantine} are left out" in out
    assert "train: 7 pictures" in out
    quarantine.write_text("image,reason\n" + "".join(f"train_{n}.jpg,missing\n" for n in range(8)))
    assert run(colour_table, tmp_path / "others") == 1
    assert (
        f"error: {quarantine} leaves out all pictures of train; mend or remove it" in capsys.readouterr().err
    )


def test_the_command_takes_one_split_and_other_columns(colour_table: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(colour_table / "captions.csv")
    rows.columns = ["picture", "text", "part"]
    rows.to_csv(colour_table / "captions.csv", index=False)
    names = ["--image-column", "picture", "--caption-column", "text", "--split-column", "part"]
    assert run(colour_table, tmp_path / "out", *names, "--split", "val") == 0
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["val"]


def test_the_way_to_train_survives_the_shell_and_names_no_split_that_was_not_written(
    colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my shards"
    assert run(colour_table, out, "--split", "val", "--split", "train", "--split", "val") == 0
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[4:] == [
        f"data.shards='{out}/train'",
        f"data.val_shards='{out}/val'",
        "data.caption_field=captions",
    ]
    rows = pd.read_csv(colour_table / "captions.csv")
    rows["split"] = rows["split"].replace({"train": "learning", "val": "dev"})
    rows.to_csv(colour_table / "captions.csv", index=False)
    assert run(colour_table, tmp_path / "out") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"{tmp_path}/out has learning, dev, test: train on one with data.shards=")
    assert "/train" not in said


@pytest.mark.parametrize("split", ["../evil", "/absolute", "..", ".", "a/b", "a\\b"])
def test_a_split_that_would_lie_elsewhere_is_refused_before_anything_is_written(
    split: str, colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    split = str(tmp_path / "absolute") if split == "/absolute" else split
    rows = pd.read_csv(colour_table / "captions.csv")
    rows["split"] = rows["split"].replace({"test": split})
    rows.to_csv(colour_table / "captions.csv", index=False)
    before = sorted(tmp_path.iterdir())
    assert run(colour_table, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert f"has a split {split!r}, which is no name of a folder" in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    assert run(colour_table, tmp_path / "out", "--split", "train") == 0, "the others can be had"


def test_a_split_that_is_not_there_is_named_before_anything_is_written(
    colour_table: Path, tmp_path: Path
) -> None:
    assert run(colour_table, tmp_path / "out", "--split", "train", "--split", "dev") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--samples-per-shard", "0"), "--samples-per-shard 0 must be at least 1"),
        (("--short-side", "-1"), "--short-side -1 must be at least 1"),
        (("--split", "dev"), "--split dev: "),
        (("--caption-column", "text"), "has no column 'text'"),
    ],
)
def test_the_commands_mistakes_are_one_line(
    options: tuple[str, ...],
    message: str,
    colour_table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(colour_table, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_interruption_ends_the_command_before_its_processes_begin_all_shards(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "in_processes", interrupted)
        assert run(colour_table, tmp_path / "out", "--samples-per-shard", "1", "--workers", "1") == 130
    assert capsys.readouterr().err == "interrupted; the same command goes on with the shards that are left\n"
    assert len(list((tmp_path / "out/train").glob("*.tar"))) < 8
    assert run(colour_table, tmp_path / "out", "--samples-per-shard", "1", "--workers", "1") == 0
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == 8


def test_a_folder_that_cannot_be_written_is_one_line(
    colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("a file")
    assert run(colour_table, tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_pictures_of_another_folder_are_not_mixed_in(
    table: CaptionTable, colour_table: Path, tmp_path: Path
) -> None:
    write_shards(table, tmp_path / "out", SETTINGS, 1)
    (tmp_path / "out" / "00001.tar").unlink()
    moved = shutil.copytree(colour_table / "images", tmp_path / "larger")
    other = CaptionTable.of(
        "train", table.image_ids, [moved / name for name in table.image_ids], table.references
    )
    with pytest.raises(InputError, match=r"holds shards written with"):
        write_shards(other, tmp_path / "out", SETTINGS, 1)
