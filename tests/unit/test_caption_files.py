"""Which files captioning takes, and what it says of them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from PIL import Image, features

from efficap.commands.caption import _new_folder
from efficap.commands.caption_folder import CaptionedFile, find_pictures, print_outcome
from efficap.commands.caption_shards import check_shards_alone
from efficap.data.pictures import Picture
from efficap.errors import InputError
from efficap.picture_files import SUFFIXES


@pytest.mark.parametrize("format", SUFFIXES)
def test_a_folders_pictures_are_found_whatever_their_format(format: str, tmp_path: Path) -> None:
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow was built without it")
    expected = []
    for suffix in SUFFIXES[format]:
        for name in (f"small{suffix}", f"LARGE{suffix.upper()}"):
            Image.new("L" if suffix == ".pgm" else "RGB", (8, 6)).save(tmp_path / name, format)
            assert Picture(tmp_path / name).format == format
            expected.append(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    assert find_pictures(str(tmp_path)) == sorted(expected)


def test_linked_folders_are_walked_once_however_they_lead_back(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images / "a" / "deep", images / "z", elsewhere):
        folder.mkdir(parents=True)
        (folder / "x.jpg").touch()
    for link, target in (
        ("a/up", images),
        ("b", images / "z"),
        ("linked", elsewhere),
        ("linked_again", elsewhere),
        ("nowhere", tmp_path / "none"),
    ):
        (images / link).symlink_to(target)
    (elsewhere / "back").symlink_to(images / "a")
    expected = ["a/deep/x.jpg", "linked/x.jpg", "z/x.jpg"]
    assert find_pictures(str(images)) == [images / name for name in expected]


@pytest.mark.parametrize("picture", ["loose.png", "below/loose.png"])
def test_a_folder_of_both_shards_and_pictures_is_refused(picture: str, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("00000.tar", "00000.tar.index.arrow", "00000_stats.json"):
        (tmp_path / name).touch()
    check_shards_alone(str(tmp_path))
    (tmp_path / picture).touch()
    with pytest.raises(
        InputError,
        match=rf"holds shards and pictures, such as {tmp_path}/{picture}; name .*images='{tmp_path}/\*.tar' for the "
        rf"shards, images='{(tmp_path / picture).parent}/\*.png' for such pictures",
    ):
        check_shards_alone(str(tmp_path))
    check_shards_alone(f"{tmp_path}/*.tar")


@pytest.mark.parametrize(("encoding", "name"), [("utf-8", "né\udce9.jpg"), ("latin-1", "né—.jpg")])
def test_a_files_name_that_the_terminal_cannot_show_is_escaped(
    encoding: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, errors="strict"))
    print_outcome(Path("out"), [CaptionedFile(Path(name), error="no picture")], before=0)
    sys.stdout.flush()
    [first, second] = shown.getvalue().decode(encoding).splitlines()
    assert (
        first == "no picture: " + name.replace("\udce9", r"\udce9").replace("—", r"\u2014") + " (no picture)"
    )
    assert second.startswith("0 captioned, 1 left out; in out")


def test_two_captionings_of_one_second_have_a_folder_each(tmp_path: Path) -> None:
    folders = {_new_folder(tmp_path / "captions") for _ in range(3)}
    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)
