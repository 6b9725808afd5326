"""The data doctor: each kind of trouble is found, counted and named; a clean data set has none."""

from __future__ import annotations

import errno
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from efficap.data import pictures
from efficap.data.doctor.__main__ import main
from efficap.data.doctor.duplicates import CROWD, find_duplicates
from efficap.data.doctor.fingerprint import LOOK
from efficap.data.doctor.histograms import histogram
from efficap.data.doctor.padding import bars
from efficap.data.shards.index import ensure_indexes, index_file, read_header, read_samples
from efficap.picture_files import MAX_PIXELS
from efficap.tokenizer import CaptionTokenizer

ODD_NAME = "a<b>&'.jpg"
ODD_CAPTION = "<script src='https://example.org/x.js'></script>"


def scene(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Soft clouds of colour with some grain: different for each seed, and rough up to the border."""
    rng = np.random.default_rng(seed)
    clouds = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(clouds.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray(np.clip(pixels + rng.integers(-20, 20, pixels.shape), 0, 255).astype(np.uint8))


def in_bars(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    square = Image.new("RGB", (160, 160), colour)
    square.paste(picture, (0, 20))
    return square


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return data.getvalue()


def write_table(folder: Path, pictures: dict[str, bytes], rows: list[tuple[str, str, str]]) -> Path:
    (folder / "images").mkdir(parents=True)
    for name, data in pictures.items():
        (folder / "images" / name).write_bytes(data)
    table = folder / "captions.csv"
    pd.DataFrame(rows, columns=["file_name", "caption", "split"]).to_csv(table, index=False)
    return table


def clean_table(folder: Path) -> Path:
    splits = ["train"] * 8 + ["val"] * 4
    pictures = {f"{n}.jpg": jpeg(scene(n)) for n in range(12)}
    rows = [(f"{n}.jpg", f"picture number {n}", split) for n, split in enumerate(splits) for _ in range(2)]
    return write_table(folder, pictures, rows)


def sick_table(folder: Path) -> Path:
    """One of everything: 9 usable pictures in train, 3 in val, 5 that cannot be read."""
    good = {f"{n}.jpg": jpeg(scene(n)) for n in range(6)}
    spoilt = {
        "cut.jpg": good["0.jpg"][:900],
        "none.jpg": b"",
        "page.jpg": b"<html>",
        "large.png": _png(400, 300),
    }
    odd = {
        ODD_NAME: jpeg(scene(3).resize((110, 80)), 60),
        "leak.jpg": jpeg(scene(10), 40),
        "bars.jpg": jpeg(in_bars(scene(20), (0, 0, 0))),
    }
    val = {f"{n}.jpg": jpeg(scene(n)) for n in (10, 11, 12)}
    rows = [(name, f"the caption of {name}", "train") for name in [*good, *spoilt, "gone.jpg", *odd]]
    rows += [(name, "a caption", "val") for name in val] + [
        ("0.jpg", " ", "train"),
        ("bare.jpg", "", "train"),
    ]
    rows += [("1.jpg", "word " * 50, "train"), (ODD_NAME, ODD_CAPTION, "train")]
    rows.sort(key=lambda row: row[1] != ODD_CAPTION)  # the page shows a picture's first caption
    return write_table(folder, good | spoilt | odd | val, rows)


def _png(width: int, height: int) -> bytes:
    data = io.BytesIO()
    scene(30, (width, height)).save(data, "PNG")
    return data.getvalue()


def run(path: object, *options: str, workers: int = 1) -> int:
    return main([str(path), "--workers", str(workers), *options])


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "doctor" / "report.json").read_text())
    found["by_title"] = {finding["title"]: finding for finding in found["findings"]}
    return found


def add_shard(tar: Path, samples: dict[str, tuple[bytes, bytes]], *, count: int | None = None) -> Path:
    """Write a shard; with `count`, statistics that speak of so many samples beside it."""
    tar.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tar, "w") as archive:
        for key, members in samples.items():
            for suffix, data in zip((".jpg", ".txt"), members, strict=True):
                info = tarfile.TarInfo(key + suffix)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    if count is not None:
        stats = {"count": count + 5, "successes": count, "failed_to_download": 5, "failed_to_resize": 0}
        stats |= {"status_dict": {"success": count, "HTTP Error 404: Not Found": 5}}
        tar.with_name(f"{tar.stem}_stats.json").write_text(json.dumps(stats))
    return tar


def samples(*seeds: int) -> dict[str, tuple[bytes, bytes]]:
    return {f"{seed:05}": (jpeg(scene(seed)), f"number {seed}".encode()) for seed in seeds}


def test_a_clean_table_has_no_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(clean_table(tmp_path), "--strict") == 0
    found = report(tmp_path)
    assert found["findings"] == []
    assert [(part["name"], part["pictures"], part["captions"]) for part in found["parts"]] == [
        ("train", 8, 16),
        ("val", 4, 8),
    ]
    assert found["captions_per_picture"] == {"2": 12}
    assert not (tmp_path / "captions.quarantine.csv").exists()
    screen = capsys.readouterr().out
    assert "Nothing is wrong" in screen
    assert "Train: python train.py model=small data=csv data.table=" in screen
    assert screen.endswith(f"data.image_dir={tmp_path}/images\n"), "and nothing that training has by itself"


def test_the_way_to_train_has_the_tables_own_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = clean_table(tmp_path)
    rows = pd.read_csv(table).set_axis(["picture", "text", "part"], axis="columns")
    rows.replace({"part": {"train": "learn"}}).to_csv(table, index=False)
    names = ["--image-column", "picture", "--caption-column", "text", "--split-column", "part"]
    assert run(table, *names, "--train-split", "learn", "--allow-absolute") == 0
    assert capsys.readouterr().out.endswith(
        "data.image_column=picture data.caption_column=text data.split_column=part data.train_split=learn "
        "data.allow_absolute=true\n"
    )


def test_a_picture_that_the_disk_does_not_give_today_is_reported_and_not_left_out_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = pictures.read_picture_file

    def read(file: Path, *arguments: Any) -> bytes:
        if file.name == "3.jpg":
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(file, *arguments)

    monkeypatch.setattr(pictures, "read_picture_file", read)
    assert run(clean_table(tmp_path)) == 0
    [finding] = report(tmp_path)["findings"]
    assert finding["title"] == "pictures that cannot be read (no access)"
    assert finding["names"] == ["3.jpg: no access: Stale file handle"]
    assert not (tmp_path / "captions.quarantine.csv").exists()


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sick")
    assert run(sick_table(folder), "--max-pixels", "100000", "--quarantine-duplicates") == 0
    return folder


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("pictures that cannot be read (truncated)", "cut.jpg: truncated"),
        ("pictures that cannot be read (empty)", "none.jpg: empty: 0 bytes"),
        ("pictures that cannot be read (no picture)", "page.jpg: no picture"),
        ("pictures that cannot be read (missing)", "gone.jpg: missing"),
        ("pictures that cannot be read (too large)", "large.png: too large: 400 x 300 = 120,000 pixels"),
        ("pictures without any caption", "bare.jpg"),
        ("captions of more than 40 words", "1.jpg (50 words): word word"),
        ("pictures that repeat an earlier one of their split", f"{ODD_NAME} = 3.jpg"),
        ("pictures in more than one split", "leak.jpg (train) = 10.jpg (val)"),
        ("pictures in bars of one colour", "bars.jpg (2"),
    ],
)
def test_each_trouble_is_found_once_and_named(sick: Path, title: str, name: str) -> None:
    finding = report(sick)["by_title"][title]
    assert finding["count"] == 1
    assert len(finding["names"]) == 1
    assert finding["names"][0].startswith(name)


def test_nothing_else_is_found(sick: Path) -> None:
    found = report(sick)
    assert found["by_title"]["empty captions"]["count"] == 2
    assert len(found["findings"]) == 11
    assert (found["pictures"], found["bad"]) == (12, 5)


def test_quarantine_holds_what_training_leaves_out(sick: Path) -> None:
    rows = pd.read_csv(sick / "captions.quarantine.csv")
    assert dict(zip(rows["image"], rows["reason"], strict=True)) == {
        "cut.jpg": "truncated",
        "none.jpg": "empty",
        "page.jpg": "no picture",
        "large.png": "too large",
        "leak.jpg": "the same as 10.jpg in val",
    }
    assert report(sick)["files"] == [str(sick / "captions.quarantine.csv")]


def test_the_page_needs_nothing_else_and_escapes_what_it_shows(sick: Path) -> None:
    page = (sick / "doctor" / "report.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 5, "two pairs and the one in bars"
    assert not re.findall(r"<(script|link|iframe|object)\b", page)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "a&lt;b&gt;&amp;&#x27;.jpg" in page
    assert "&lt;script src=" in page
    assert page.count("<svg") == 3


def test_a_stale_quarantine_goes(tmp_path: Path) -> None:
    table = clean_table(tmp_path)
    (tmp_path / "captions.quarantine.csv").write_text("image,reason\n0.jpg,missing\n")
    run(table)
    assert not (tmp_path / "captions.quarantine.csv").exists()


def test_duplicates_stay_in_training_unless_asked_for(tmp_path: Path) -> None:
    table = clean_table(tmp_path)
    (tmp_path / "images" / "9.jpg").write_bytes((tmp_path / "images" / "0.jpg").read_bytes())
    assert run(table, "--strict") == 3
    assert report(tmp_path)["by_title"]["pictures in more than one split"]["names"] == [
        "0.jpg (train) = 9.jpg (val)"
    ]
    assert not (tmp_path / "captions.quarantine.csv").exists()


@pytest.mark.slow  # starts processes that import torch
def test_several_processes_report_the_same(tmp_path: Path) -> None:
    one, two = sick_table(tmp_path / "one"), sick_table(tmp_path / "two")
    run(one, workers=1)
    run(two, workers=2)
    alone, together = report(tmp_path / "one"), report(tmp_path / "two")
    for found in (alone, together):
        del found["source"], found["files"]
    assert alone == together


def test_captions_are_measured_in_tokens_where_a_tokenizer_is_named(tmp_path: Path) -> None:
    table = clean_table(tmp_path)
    CaptionTokenizer.learn(["picture number"], 257).save(tmp_path / "tokenizer")  # one token a byte
    run(table, "--tokenizer", str(tmp_path / "tokenizer"), "--max-tokens", "19")
    # A leading space, "picture number 10" and two special tokens are 20.
    finding = report(tmp_path)["by_title"]["captions of more than 19 tokens"]
    assert finding["count"] == 4
    assert finding["names"][0].startswith("10.jpg (3 words): picture number 10")


def test_flat_pictures_are_no_duplicates_unless_they_are_equal(tmp_path: Path) -> None:
    colours = [(n * 15, 128, 255 - n * 15) for n in range(16)]
    pictures = {f"{n}.png": _flat(colour) for n, colour in enumerate([*colours, colours[3]])}
    run(write_table(tmp_path, pictures, [(name, "flat", "train") for name in pictures]))
    found = report(tmp_path)
    assert [finding["names"] for finding in found["findings"]] == [["3.png = 16.png"]]
    assert found["notes"] == ["17 pictures without contrast were compared by their pixels alone"]


def _flat(colour: tuple[int, int, int]) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(data, "PNG")
    return data.getvalue()


def test_the_same_shape_in_another_colour_is_another_picture(tmp_path: Path) -> None:
    red, green = scene(0), Image.merge("RGB", [scene(0).split()[channel] for channel in (1, 0, 2)])
    pictures = {"red.jpg": jpeg(red), "green.jpg": jpeg(green)}
    run(write_table(tmp_path, pictures, [(name, "shape", "train") for name in pictures]))
    assert report(tmp_path)["findings"] == []


def test_near_hashes_are_found_as_by_comparing_each_with_each() -> None:
    rng = np.random.default_rng(0)
    looks = np.zeros(400, LOOK)
    looks["digest"] = np.arange(400)
    looks["hash"][:200] = rng.integers(0, 2**63, 200, dtype=np.uint64) & ~np.uint64(1)
    for number in range(200):  # each with 0 to 9 of its bits changed
        flips = np.uint64(1) << rng.choice(np.arange(1, 64, dtype=np.uint64), number % 10, replace=False)
        looks["hash"][200 + number] = looks["hash"][number] ^ np.bitwise_or.reduce(
            flips, initial=np.uint64(0)
        )
    expected = [[n, 200 + n] for n in range(200) if n % 10 <= 4]
    assert find_duplicates(looks) == expected


def test_a_crowd_of_equal_hashes_is_one_group() -> None:
    looks = np.zeros(3 * CROWD, LOOK)
    looks["digest"], looks["hash"] = np.arange(len(looks)), 12345678
    assert find_duplicates(looks) == [list(range(len(looks)))]


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (10, 60, 120)])
def test_bars_are_found_on_either_axis(colour: tuple[int, int, int]) -> None:
    pixels = np.asarray(in_bars(scene(1), colour))
    assert bars(pixels) == (25, 0)
    assert bars(pixels.transpose(1, 0, 2)) == (0, 25)


def test_skies_studios_and_flat_pictures_are_no_bars() -> None:
    sky = np.asarray(scene(1)).copy()
    sky[:40] = 250
    assert bars(sky) == (0, 0), "there is no counterpart below"
    studio = np.full((120, 160, 3), 255, np.uint8)
    studio[40:80, 60:100] = np.asarray(scene(2, (40, 40)))
    assert bars(studio) == (0, 0), "its object fills but a part of the line"
    assert bars(np.full((120, 160, 3), 255, np.uint8)) == (0, 0)


def test_shards_are_looked_through_and_indexed_in_one_pass(tmp_path: Path) -> None:
    good = add_shard(tmp_path / "a" / "00000.tar", samples(0, 1, 2), count=3)
    again = {
        "x": (jpeg(scene(1), 50), b"once more"),
        "y": (b"<html>", b"no picture"),
        "z": (jpeg(scene(9)), b" "),
    }
    other = add_shard(tmp_path / "a" / "00001.tar", samples(4, 5) | again, count=9)
    cut = add_shard(tmp_path / "a" / "00002.tar", samples(6, 7))
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2 - 9000])
    assert run(tmp_path / "a", "--strict") == 3
    found = report(tmp_path / "a")
    titles = {title: finding["names"] for title, finding in found["by_title"].items()}
    assert titles.pop("shards: cut tar")[0].startswith("00002.tar: cut tar")
    assert titles.pop("samples that cannot be used (no picture)")[0].startswith("00001.tar: y (begins with")
    assert titles.pop("samples that cannot be used (empty caption)") == ["00001.tar: z"]
    assert titles.pop("pictures that repeat an earlier one") == ["00000.tar: 00001 = 00001.tar: x"]
    unequal = titles.pop("shards with another number of samples than their statistics say")
    assert unequal == ["00001.tar: 5 of 9 samples, 4 missing"]
    assert titles.pop("shards without statistics, as an interrupted download leaves them") == ["00002.tar"]
    assert not [title for title in titles if "truncated" not in title], "of the sample at the cut"
    assert found["downloads"] == {
        "shards": 2,
        "urls": 22,
        "successes": 12,
        "found": 8,
        "failures": {"HTTP Error 404: Not Found": 10},
    }
    elsewhere = tmp_path / "indexes"
    ensure_indexes([good, other], index_dir=elsewhere, max_pixels=MAX_PIXELS, workers=1)
    for tar in (good, other):
        assert read_header(tar) == read_header(tar, elsewhere)
        assert read_samples(tar).equals(read_samples(tar, elsewhere))
    assert '<img alt=""' in (tmp_path / "a" / "doctor" / "report.html").read_text()


def test_indexes_may_go_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = add_shard(tmp_path / "a" / "0.tar", samples(0, 1))
    run(tmp_path / "a" / "{0..0}.tar", "--index-dir", str(tmp_path / "i"), "--out", str(tmp_path / "doctor"))
    assert report(tmp_path)["findings"] == []
    assert index_file(tar, tmp_path / "i").is_file()
    assert not index_file(tar, None).exists()
    assert "'data.shards=" in capsys.readouterr().out, "quoted for the shell and Hydra"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("none.csv", (), "none.csv does not exist"),
        ("none/*.tar", (), "matches no tar"),
        ("captions.csv", ("--image-dir", "nowhere"), "nowhere is no directory"),
        ("captions.csv", ("--max-words", "0"), "--max-words 0 must be at least 1"),
        ("captions.csv", ("--tokenizer", "no/such"), "--tokenizer no/such"),
        ("captions.csv", ("--out", "captions.csv/x"), "name another folder with --out DIR"),
    ],
)
def test_what_cannot_be_looked_through_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    path: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    clean_table(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run(path, *options) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_help_does_without_torch() -> None:
    code = "import sys; from efficap.data.doctor.__main__ import _parser; _parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_histogram_keeps_all_values_in_round_bins() -> None:
    values = np.arange(100, 740, dtype=np.float64)
    entry = histogram("x", np.append(values, 9000.0), np.ones(641, np.int64))
    assert entry is not None
    assert sum(entry.counts) == 641
    assert (entry.edges[0], entry.edges[1], entry.least, entry.most) == (100, 150, 100, 9000)
    assert len(entry.counts) == len(entry.edges) - 1 <= 25
    assert histogram("x", values[:0], np.ones(0, np.int64)) is None
