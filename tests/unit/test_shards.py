"""Shards: what is found in a tar, what is left out of it and why, and that an index never lends a caption."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tars import Member, ThisProcess, encoded, indexed, jpeg, sample, samples, scenery, tar_bytes, write_tar

from efficap.data import pool
from efficap.data.shards import index
from efficap.data.shards.examine import IndexHeader, examine
from efficap.data.shards.index import ensure_indexes, index_file, read_header, write_index
from efficap.data.shards.names import find_shards
from efficap.data.shards.reader import ShardReader
from efficap.data.shards.tar import SampleError, read_contents
from efficap.errors import InputError
from efficap.picture_files import MAX_PIXELS

OPEN = 16
GOOD = samples("0000", "0001")
PNG = encoded(Image.fromarray(scenery(40, 30)), "PNG")
GIF = encoded(Image.fromarray(scenery(40, 30)), "GIF")
TEXT = b"a caption"


def damaged(data: bytes, place: float = 0.5) -> bytes:
    """The same length, with a few other bytes in it."""
    at = int(len(data) * place)
    return data[:at] + bytes(255 - byte for byte in data[at : at + 8]) + data[at + 8 :]


BAD: dict[str, tuple[list[Member], str]] = {
    "a truncated jpeg": (sample("bad", "x", jpeg()[:-100]), "truncated"),
    "a jpeg of 30 bytes": (sample("bad", "x", jpeg()[:30]), "truncated"),
    "0 bytes": (sample("bad", "x", b""), "empty"),
    "html": (sample("bad", "x", b"<html>not found</html>"), "no picture"),
    "a truncated png": ([("bad.png", PNG[: len(PNG) // 2]), ("bad.txt", TEXT)], "truncated"),
    "a damaged png": ([("bad.png", damaged(PNG)), ("bad.txt", TEXT)], "unreadable"),
    "no caption": ([("bad.jpg", jpeg())], "no caption"),
    "an empty .txt": ([("bad.jpg", jpeg()), ("bad.txt", b" \n")], "empty caption"),
    "an empty .txt and json": (sample("bad", " "), "empty caption"),
    "nothing but what cleaning takes away": (sample("bad", "&nbsp;\u200b"), "empty caption"),
    "no UTF-8": ([("bad.jpg", jpeg()), ("bad.txt", b"caf\xe9")], "no UTF-8"),
    "broken json": ([*sample("bad", "x")[:2], ("bad.json", b'{"caption": ')], "broken json"),
    "json that is no object": ([*sample("bad", "x")[:2], ("bad.json", b"[1]")], "broken json"),
    "deep json": ([*sample("bad", "x")[:2], ("bad.json", b"[" * 100_000)], "broken json"),
    "json without a text": ([("bad.jpg", jpeg()), ("bad.json", b'{"caption": 7}')], "no caption"),
    "no picture": ([("bad.txt", TEXT), ("bad.json", b"{}")], "no picture"),
    "a second .jpg": ([*sample("bad", "x"), ("bad.jpg", jpeg(1))], "duplicate key"),
    "a second .txt": ([*sample("bad", "x"), ("bad.txt", b"another")], "duplicate key"),
    "two kinds of picture": ([*sample("bad", "x"), ("bad.png", PNG)], "duplicate key"),
    "above the folder": (sample("../bad", "x"), "unsafe name"),
    "above a folder": (sample("a/../../bad", "x"), "unsafe name"),
    "an absolute name": (sample("/etc/bad", "x"), "unsafe name"),
    "a name that is no UTF-8": (sample("bad\udce9", "x"), "unsafe name"),
    "half a character as its id": (sample("bad", "x", image_id="\ud83d"), "unsafe name"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_left_out_with_its_reason_and_the_others_are_kept(kind: str, tmp_path: Path) -> None:
    members, reason = BAD[kind]
    for number, order in enumerate(([*GOOD, *members], [*members, *GOOD])):
        tar = write_tar(tmp_path / f"{number}.tar", order)
        examined = examine(tar, max_pixels=MAX_PIXELS)
        assert examined.header.bad == {reason: 1}
        assert examined.header.problem is None
        assert examined.header.good == 2
        assert examined.samples["key"].to_pylist() == ["0000", "0001"]
        assert examined.header.first_bad is not None
        assert examined.header.first_bad[1] == reason
        assert [bad.reason for bad in examined.bad] == [reason]
        reader = indexed(tar)
        assert [reader.read(n).captions for n in (0, 1)] == [["the picture 0000"], ["the picture 0001"]]


KEPT: dict[str, list[Member]] = {
    "a gif named .jpg": sample("good", "x", GIF),
    "a png named .jpg": sample("good", "x", PNG),
    "other suffixes": [("good.JPEG", jpeg()), ("good.TXT", b"x")],
    "json alone": [("good.webp", encoded(Image.fromarray(scenery(9, 9)), "WEBP")), ("good.json", b'{"caption": "x"}')],
    "members of other kinds": [*sample("good", "x"), ("good.cls", b"7"), ("good.npy", b""), ("good", b"?")],
    "a parquet and statistics": [*sample("good", "x"), ("part.parquet", b"PAR1"), ("README", b"hello")],
    "a key with dots": sample("a.b.c", "x"),
    "a hidden name": sample(".hidden", "x"),
    "a folder": sample("deep/below/good", "x"),
    "from tar -C": sample("./good", "x"),
    "two slashes": sample("a//good", "x"),
    "another script": sample("日本/写真", "x"),
    "empty members": [*sample("good", "x"), ("good.log", b"")],
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_is_unusual_but_good_is_kept(kind: str, format: int, tmp_path: Path) -> None:
    members = KEPT[kind]
    tar = write_tar(tmp_path / "t.tar", [*GOOD, *members], format)
    examined = examine(tar, max_pixels=MAX_PIXELS)
    assert examined.header.bad == {}
    assert examined.header.good == 3
    reader = indexed(tar, caption_field="caption" if kind == "json alone" else None)
    if kind != "json alone":
        assert reader.read(2).captions == ["x"]
        assert reader.read(2).image == members[0][1]
    assert reader.image_id(2).startswith("t/")


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["n" * 97, "n" * 120, "d" * 90 + "/" + "n" * 200, "ö" * 90, "日" * 300])
def test_very_long_names_are_read_whole(key: str, format: int, tmp_path: Path) -> None:
    other = key[:-1] + "x"
    tar = write_tar(tmp_path / "t.tar", [*sample(key, "one"), *sample(other, "other")], format)
    reader = indexed(tar)
    assert [reader.image_id(n) for n in range(len(reader))] == [f"t/{key}", f"t/{other}"]
    assert [reader.read(n).captions for n in range(2)] == [["one"], ["other"]]


def test_webdatasets_keys_with_dots_stay_apart(tmp_path: Path) -> None:
    """Where DALI takes `b.c.jpg` for the suffix."""
    reader = indexed(write_tar(tmp_path / "t.tar", samples("a.b.c", "a.b.d", "a.b")))
    found = {reader.image_id(n): reader.read(n) for n in range(3)}
    assert {image_id: sample.captions for image_id, sample in found.items()} == {
        f"t/{key}": [f"the picture {key}"] for key in ("a.b.c", "a.b.d", "a.b")
    }
    assert len({sample.image for sample in found.values()}) == 3


def with_links(kind: bytes, target: Path | str) -> bytes:
    data = io.BytesIO(tar_bytes(GOOD))
    with tarfile.open(fileobj=data, mode="a") as archive:
        for name in ("link.jpg", "link.txt"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(target)
            archive.addfile(member)
        text = tarfile.TarInfo("half.txt")
        text.size = len(TEXT)
        archive.addfile(text, io.BytesIO(TEXT))
        picture = tarfile.TarInfo("half.jpg")
        picture.type, picture.linkname = kind, str(target)
        archive.addfile(picture)
    return data.getvalue()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_are_never_followed(kind: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg())
    for target in (tmp_path / "secret.jpg", "0000.jpg"):
        tar = tmp_path / "t.tar"
        tar.write_bytes(with_links(kind, target))
        examined = examine(tar, max_pixels=MAX_PIXELS)
        assert examined.header.bad == {"no picture": 1}, "half.txt is without its picture"
        assert examined.samples["key"].to_pylist() == ["0000", "0001"]


def test_odd_members_are_passed_over(tmp_path: Path) -> None:
    data = io.BytesIO(tar_bytes(GOOD))
    with tarfile.open(fileobj=data, mode="a") as archive:
        for name, kind in (
            ("folder.jpg", tarfile.DIRTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
            ("tty.jpg", tarfile.CHRTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
    (tmp_path / "t.tar").write_bytes(data.getvalue())
    header = examine(tmp_path / "t.tar", max_pixels=MAX_PIXELS).header
    assert (header.good, header.bad) == (2, {})


def test_a_decompression_bomb_is_refused_before_it_is_decoded_and_the_limit_is_named(tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000, "900 million pixels"
    examined = examine(write_tar(tmp_path / "t.tar", [*GOOD, *sample("bomb", "x", bomb)]), max_pixels=80 * 72)
    assert examined.header.bad == {"too large": 1}
    assert "900000000 pixels" in str(examined.bad[0])
    assert str(examined.bad[0]).endswith("the limit is 5,760)")
    assert examined.header.good == 2, "just as large as is allowed"
    assert examine(tmp_path / "t.tar", max_pixels=80 * 72 - 1).header.bad == {"too large": 3}
    assert "the limit is 178,956,970)" in str(examine(tmp_path / "t.tar", max_pixels=MAX_PIXELS).bad[0])


def cut(tar: bytes, where: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in archive]
        last = archive.getmembers()[-3]  # its picture
    places = {
        "in the last picture": last.offset_data + last.size // 2,
        "in the header of the last picture": last.offset_data - 300,
        "before the last sample": ends[-4],
        "between the last picture and its text": ends[-3],
        "after the last member": ends[-1],
        "in the zeros": ends[-1] + 100,
        "in the first header": 100,
        "in the first picture": 600,
    }
    return tar[: places[where]]


@pytest.mark.parametrize(
    ("where", "good", "bad", "problem"),
    [
        ("in the last picture", 2, {"truncated": 1}, "cut tar"),
        ("in the header of the last picture", 2, {}, "cut tar"),
        ("before the last sample", 2, {}, "cut tar"),
        ("between the last picture and its text", 2, {"no caption": 1}, "cut tar"),
        ("after the last member", 3, {}, "cut tar"),
        ("in the zeros", 3, {}, "cut tar"),
        ("in the first picture", 0, {"truncated": 1}, "cut tar"),
        ("in the first header", 0, {}, "no tar (truncated header)"),
    ],
)
def test_a_cut_tar_gives_what_it_still_has_and_is_known_as_cut(
    where: str, good: int, bad: dict[str, int], problem: str, tmp_path: Path
) -> None:
    tar = tmp_path / "t.tar"
    tar.write_bytes(cut(tar_bytes(samples("0000", "0001", "0002")), where))
    header = examine(tar, max_pixels=MAX_PIXELS).header
    assert (header.good, header.bad, header.problem) == (good, bad, problem)
    reader = indexed(tar)
    assert [reader.read(n).captions for n in range(good)] == [[f"the picture 000{n}"] for n in range(good)]


@pytest.mark.parametrize("size", [-512, -1, -(1 << 40)])
def test_a_member_of_negative_size_ends_the_tar_and_not_the_program(size: int, tmp_path: Path) -> None:
    """Python's tarfile before 3.11.14 goes round for ever."""
    data = bytearray(tar_bytes([*GOOD, ("x.jpg", b"x")]))
    at = data.index(b"x.jpg\0")
    header = data[at : at + 512]
    header[124:136] = (size & (1 << 96) - 1).to_bytes(12, "big")  # base 256, as GNU writes what is large
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    (tmp_path / "t.tar").write_bytes(data)
    contents = read_contents(tmp_path / "t.tar")
    assert contents.problem == "cut tar"
    assert [sample.key for sample in contents.samples] == ["0000", "0001"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "empty tar"),
        (tar_bytes([]), "empty tar"),
        (tar_bytes([("README", b"nothing here")]), "empty tar"),
        (gzip.compress(tar_bytes(GOOD)), "compressed tar"),
        (b"PAR1" * 500, "no tar"),
        (b"{}", "no tar"),
        (bytes(600), "empty tar"),
    ],
    ids=["0 bytes", "no member", "no sample", "gzip", "parquet", "json", "zeros"],
)
def test_what_is_no_tar_or_has_no_sample_is_said(data: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "t.tar").write_bytes(data)
    examined = examine(tmp_path / "t.tar", max_pixels=MAX_PIXELS)
    assert examined.header.good == len(examined.samples) == 0
    assert examined.header.problem is not None
    assert examined.header.problem.startswith(problem)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=12), st.integers(0, 10_000))
def test_no_damage_to_a_tar_breaks_the_examination(changes: list[tuple[int, int]], keep: int) -> None:
    whole = bytearray(DAMAGE_ME)
    for place, value in changes:
        whole[place % len(whole)] = value
    file = SCRATCH / "damaged.tar"
    file.write_bytes(whole[: len(whole) - keep if keep < len(whole) // 2 else None])
    header = examine(file, max_pixels=MAX_PIXELS).header
    assert header.good + sum(header.bad.values()) <= 20
    try:
        for entry in read_contents(file).samples:
            for extent in filter(None, (entry.image, entry.text, entry.json)):
                assert 0 <= extent.size <= file.stat().st_size - extent.offset
    finally:
        file.unlink()


DAMAGE_ME = tar_bytes(
    [(name, data[:20] if name.endswith("jpg") else data) for name, data in samples("0", "ö", "n" * 120)],
    tarfile.PAX_FORMAT,
)
SCRATCH = Path()


@pytest.fixture(autouse=True, scope="module")
def _scratch(tmp_path_factory: pytest.TempPathFactory) -> None:
    global SCRATCH
    SCRATCH = tmp_path_factory.mktemp("scratch")


# The index


def ensure(
    *tars: Path, index_dir: Path | None = None, max_pixels: int = MAX_PIXELS
) -> dict[Path, IndexHeader]:
    return ensure_indexes(list(tars), index_dir=index_dir, max_pixels=max_pixels, workers=1)


@pytest.fixture
def examined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars that are gone through, as `ensure_indexes` does it; in this process."""
    seen: list[str] = []

    def spy(tar: Path, *, max_pixels: int) -> Any:
        seen.append(tar.name)
        return examine(tar, max_pixels=max_pixels)

    monkeypatch.setattr(index, "examine", spy)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", ThisProcess)
    return seen


def open_reader(*tars: Path, index_dir: Path | None = None, caption_field: str | None = None) -> ShardReader:
    """As training opens it: after `ensure_indexes`."""
    from efficap.data.text import CaptionText

    headers = ensure(*tars, index_dir=index_dir)
    text = CaptionText(lowercase=False, final_stop="keep", min_words=None, max_words=None, exclude=None)
    return ShardReader(
        list(tars),
        [headers[tar] for tar in tars],
        index_dir=index_dir,
        caption_field=caption_field,
        text=text,
    )


def test_processes_index_many_shards_and_the_next_start_reads_headers_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", samples(f"{n}a", f"{n}b")) for n in range(3)]
    headers = ensure_indexes(tars, index_dir=None, max_pixels=MAX_PIXELS, workers=2)
    assert [header.good for header in headers.values()] == [2, 2, 2]
    assert "3 of 3 shards have no valid index" in capsys.readouterr().err
    assert ensure(*tars) == headers
    assert capsys.readouterr().err == ""
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_an_index_is_made_once(examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    first = ensure(tar)[tar]
    assert ensure(tar)[tar] == first
    assert examined == ["t.tar"]


def test_a_touched_or_copied_tar_keeps_its_index(examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    before = ensure(tar)[tar]
    os.utime(tar, ns=(1, before.mtime_ns + 10**9))
    touched = ensure(tar)[tar]
    assert (touched.digest, touched.mtime_ns) == (before.digest, before.mtime_ns + 10**9)
    copy = tmp_path / "elsewhere" / "t.tar"
    copy.parent.mkdir()
    shutil.copyfile(tar, copy)
    shutil.copyfile(index_file(tar, None), index_file(copy, None))
    assert ensure(copy)[copy].digest == before.digest
    assert examined == ["t.tar"], "once"
    assert open_reader(copy).read(1).captions == ["the picture 0001"]
    assert read_header(copy) == ensure(copy)[copy], "written with the new time"


def test_a_changed_tar_of_the_same_layout_and_size_is_noticed(examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    before = ensure(tar)[tar]
    other = [(name, data.replace(b"the picture", b"another one")) for name, data in GOOD]
    write_tar(tar, other)
    os.utime(tar, ns=(1, before.mtime_ns + 1))
    after = ensure(tar)[tar]
    assert tar.stat().st_size == before.size
    assert after.digest != before.digest
    assert examined == ["t.tar", "t.tar"]
    assert open_reader(tar).read(0).captions == ["another one 0000"]


def test_a_larger_tar_is_indexed_anew(examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    times = tar.stat().st_mtime_ns
    assert ensure(tar)[tar].good == 2
    write_tar(tar, [*GOOD, *samples(*(f"1{n:03}" for n in range(10)))])
    os.utime(tar, ns=(times, times))
    assert ensure(tar)[tar].good == 12
    assert examined == ["t.tar", "t.tar"]


def test_another_limit_of_pixels_asks_for_another_index(examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    assert ensure(tar, max_pixels=100)[tar].bad == {"too large": 2}
    assert ensure(tar)[tar].good == 2
    assert ensure(tar, max_pixels=100)[tar].good == 0


def test_an_index_of_another_tar_beside_it_is_not_believed(examined: list[str], tmp_path: Path) -> None:
    """A tar of the same layout: the same sizes in the same places, other pictures and captions."""
    one = write_tar(tmp_path / "one.tar", same_size("a", "0", "1"))
    other = write_tar(tmp_path / "other.tar", same_size("b", "2", "3"))
    assert one.stat().st_size == other.stat().st_size
    ensure(one, other)
    shutil.copyfile(index_file(one, None), index_file(other, None))
    os.utime(other, ns=(1, one.stat().st_mtime_ns + 1))
    reader = open_reader(other)
    assert [reader.image_id(n) for n in range(2)] == ["other/2", "other/3"]
    assert [reader.read(n).captions for n in range(2)] == [["the b 2"], ["the b 3"]]


def same_size(word: str, *keys: str) -> list[Member]:
    """Samples of 2,000 bytes of picture, whatever they show."""
    members = []
    for key in keys:
        picture = jpeg(ord(key), 40, 30)
        members += [
            (f"{key}.jpg", picture + bytes(2000 - len(picture))),
            (f"{key}.txt", f"the {word} {key}".encode()),
        ]
    return members


@pytest.mark.parametrize("keys", [("2", "3"), ("0", "x"), ("00", "01"), ("0.", "1 ")])
def test_with_a_forged_time_the_tars_own_headers_tell(
    keys: tuple[str, str], examined: list[str], tmp_path: Path
) -> None:
    one = write_tar(tmp_path / "one.tar", same_size("a", "0", "1"))
    other = write_tar(tmp_path / "other.tar", [
        (name.replace("0.", f"{keys[0]}.").replace("1.", f"{keys[1]}."), data)
        for name, data in same_size("b", "0", "1")
    ])  # fmt: skip
    ensure(one)
    shutil.copyfile(index_file(one, None), index_file(other, None))
    os.utime(other, ns=(1, one.stat().st_mtime_ns))
    reader = open_reader(other)  # which believes the index
    for number, (mine, theirs) in enumerate(zip("01", keys, strict=True)):
        if mine == theirs:
            assert reader.read(number).captions == [f"the b {number}"], "it is in both tars"
        else:
            with pytest.raises(SampleError, match="changed tar"):
                reader.read(number)


def test_a_tar_that_changes_while_it_is_read_fails_by_sample(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", samples("0", "1", "2"))
    reader = indexed(tar)
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        picture, text = (archive.getmember(name) for name in ("1.jpg", "1.txt"))
    header = whole[picture.offset : picture.offset + 512]
    for changed in (
        header.replace(b"1.jpg", b"7.jpg"),
        bytes(512),
        b"\xff" * 512,
        header[:124] + b"not a number" + header[136:],
        header[:124] + b"\x80" + header[125:],
    ):
        tar.write_bytes(whole[: picture.offset] + changed + whole[picture.offset + 512 :])
        with pytest.raises(SampleError, match="changed tar: its index no longer fits"):
            reader.read(1)
        assert reader.read(0).captions == ["the picture 0"]
        assert reader.read(2).captions == ["the picture 2"]
    tar.write_bytes(whole[: text.offset_data + 3])
    with pytest.raises(SampleError, match="changed tar"):
        reader.read(1)
    assert reader.read(0).captions == ["the picture 0"]


def test_a_tar_that_cannot_be_read_fails_by_sample_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = [write_tar(tmp_path / f"{n}.tar", samples(f"{n}")) for n in range(3)]
    reader = indexed(tars)
    tars[1].unlink()  # before it was opened
    assert reader.read(0).captions == ["the picture 0"]
    with pytest.raises(SampleError, match=r"no access: .*No such file.*1.tar"):
        reader.read(1)
    assert reader.read(2).captions == ["the picture 2"]

    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", broken)
        with pytest.raises(SampleError, match=r"no access: .*Input/output error"):
            reader.read(0)
    assert reader.read(0).captions == ["the picture 0"]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut": lambda data: data[: len(data) // 2],
    "html": lambda _: b"<html></html>",
    "zeros": lambda data: bytes(len(data)),
    "without its end": lambda data: data[:-10],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_anew(damage: str, examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    before = ensure(tar)[tar]
    file = index_file(tar, None)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert read_header(tar) is None
    assert ensure(tar)[tar] == before
    assert examined == ["t.tar", "t.tar"]
    assert open_reader(tar).read(0).captions == ["the picture 0000"]


@pytest.mark.parametrize(
    "metadata", [None, b"[]", b"{}", b'{"first_bad": null}', b"7", b'{"first_bad": null, "x": 1}']
)
def test_an_arrow_file_of_another_origin_is_no_index(
    metadata: bytes | None, examined: list[str], tmp_path: Path
) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    schema = pa.schema([("key", pa.string())], {b"efficap.index": metadata} if metadata else None)
    with pa.OSFile(str(index_file(tar, None)), "wb") as sink, pa.ipc.new_file(sink, schema):
        pass
    assert ensure(tar)[tar].good == 2
    assert examined == ["t.tar"]


def test_an_index_of_another_version_is_made_anew(
    examined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficap.data.shards import examine as examination

    tar = write_tar(tmp_path / "t.tar", GOOD)
    with monkeypatch.context() as older:
        older.setattr(examination, "VERSION", index.VERSION - 1)
        write_index(examine(tar, max_pixels=MAX_PIXELS), tar)
    assert ensure(tar)[tar].version == index.VERSION
    assert examined == ["t.tar"]


def test_a_folder_that_cannot_be_written_names_the_setting(examined: list[str], tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", GOOD)
    (tmp_path / "file").write_text("in its place")
    with pytest.raises(InputError, match=r"the index .*/file/t\..* cannot be written .*data.index_dir=DIR"):
        ensure(tar, index_dir=tmp_path / "file")
    index_file(tar, None).mkdir()
    with pytest.raises(InputError, match=r"t.tar.index.arrow cannot be written .*data.index_dir=DIR"):
        ensure(tar)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "t.tar", "t.tar.index.arrow"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_folder_names_the_setting(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "read_only" / "t.tar", GOOD)
    tar.parent.chmod(0o555)
    try:
        with pytest.raises(InputError, match=r"data.index_dir=DIR"):
            ensure(tar)
    finally:
        tar.parent.chmod(0o755)


def test_a_folder_of_indexes_keeps_tars_of_the_same_name_apart(examined: list[str], tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / folder / "0.tar", samples(f"{folder}{folder}")) for folder in "ab"]
    reader = open_reader(*tars, index_dir=tmp_path / "indexes" / "here")
    assert [reader.read(n).captions for n in range(2)] == [["the picture aa"], ["the picture bb"]]
    assert len(list((tmp_path / "indexes" / "here").iterdir())) == 2
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["0.tar"], "nothing beside the tars"


# The reader


@pytest.mark.parametrize(
    ("field", "captions"),
    [
        (None, ["Café in the Text"]),
        ("caption", ["one"]),
        ("captions", ["two words", "three"]),
        ("mixed", ["kept"]),
    ],
)
def test_captions_come_from_the_txt_or_from_a_field_of_the_json_and_are_cleaned(
    field: str | None, captions: list[str], tmp_path: Path
) -> None:
    fields = {
        "caption": " one\u200b",
        "captions": ["two\u2028words", "", "three\n"],
        "mixed": [1, None, "kept"],
    }
    members = [
        ("a.jpg", jpeg()),
        ("a.txt", "Cafe\u0301  in\r\nthe Text".encode()),
        ("a.json", json.dumps(fields).encode()),
    ]
    reader = indexed(write_tar(tmp_path / "t.tar", members), caption_field=field)
    assert reader.read(0).captions == reader.captions(0) == captions


@pytest.mark.parametrize(
    ("members", "field", "message"),
    [
        ([("a.jpg", jpeg()), ("a.json", b'{"caption": "x"}')], None, "no caption: no .txt"),
        ([("a.jpg", jpeg()), ("a.txt", b"x")], "caption", "no caption: no .json"),
        (sample("a", "x"), "other", "no caption: no text in the json's field 'other'"),
        ([*sample("a", "x")[:1], ("a.txt", "\u200b".encode()), ("a.json", b'{"caption": "x"}')], None, "empty caption"),
    ],
)  # fmt: skip
def test_a_caption_that_is_not_where_it_is_looked_for_fails_by_sample(
    members: list[Member], field: str | None, message: str, tmp_path: Path
) -> None:
    reader = indexed(write_tar(tmp_path / "t.tar", members), caption_field=field)
    with pytest.raises(SampleError, match=message):
        reader.read(0)


def test_samples_of_many_shards_are_numbered_through(tmp_path: Path) -> None:
    counts = [3, 0, 1, 0, 2]
    keys = [[f"{shard}_{n}" for n in range(count)] for shard, count in enumerate(counts)]
    tars = [write_tar(tmp_path / f"{shard}.tar", samples(*of_shard)) for shard, of_shard in enumerate(keys)]
    reader = indexed(tars)
    assert reader.counts.tolist() == counts
    flat = [key for of_shard in keys for key in of_shard]
    assert len(reader) == len(flat)
    for number in np.random.default_rng(0).permutation(len(flat)).tolist():
        key = flat[number]
        assert reader.read(number).captions == [f"the picture {key}"]
        assert reader.image_id(number) == f"{key[0]}/{key}"
        assert reader.name(number) == f"{tmp_path / key[0]}.tar: {key}"


def test_only_so_many_shards_are_open_at_once(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / f"{n:03}.tar", [("a.bmp", BMP), ("a.txt", b"x")]) for n in range(OPEN + 30)]
    reader = indexed(tars)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number in range(len(reader)):
            assert reader.read(number).captions == ["x"]
            assert len(reader._open) <= OPEN
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * OPEN
    assert list(reader._open) == list(range(30, OPEN + 30)), "those that were used last"


BMP = encoded(Image.new("RGB", (2, 2)), "BMP")


# Which shards are meant


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "other/x.tar"):
        write_tar(tmp_path / name, [])
    for name in ("00000.parquet", "00000_stats.json", "00000.tar.index.arrow", "00003.tar.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.tar").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("shards", "names"),
    [
        ("{00000..00002}.tar", ["00000", "00001", "00002"]),
        ("{00000..00001}.tar", ["00000", "00001"]),
        ("{00002,00000}.tar", ["00000", "00002"]),
        ("0000*.tar", ["00000", "00001", "00002"]),
        ("0000[12].tar", ["00001", "00002"]),
        ("", ["00000", "00001", "00002"]),
        ("00001.tar", ["00001"]),
        (["00001.tar", "0000*.tar", "other"], ["00000", "00001", "00002", "x"]),
        ("{.,other}/*.tar", ["00000", "00001", "00002", "x"]),
        ("**/*.tar", ["00000", "00001", "00002", "x"]),
    ],
)
def test_shards_are_named_by_lists_globs_and_folders(
    shards: str | list[str], names: list[str], folder: Path
) -> None:
    words = [f"{folder}/{word}" for word in ([shards] if isinstance(shards, str) else shards)]
    found = find_shards(words[0] if isinstance(shards, str) else words, "data.shards")
    assert [tar.stem for tar in found] == names
    assert all(tar.is_absolute() for tar in found)


def test_shards_may_be_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert find_shards("{00000..00001}.tar", "x") == [folder / "00000.tar", folder / "00001.tar"]


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            "{00000..00004}.tar",
            r"2 of 5 do not exist, the first is .*00003.tar; data.shards=.* takes all tars",
        ),
        ("none.tar", r"none.tar matches no tar; .* holds 00000.parquet, 00000.tar, "),
        ("none/*.tar", r"matches no tar; .* holds 00000"),
        ("none/deep/below", r"matches no tar; .* holds 00000"),
        ("folder.tar", r"folder.tar matches no tar; .*folder.tar holds nothing"),
        ("00000.parquet", r"00000.parquet is no .tar"),
        ("00000_stats.json", r"00000_stats.json is no .tar"),
        ("0000*", r"is no .tar; unpack compressed ones first"),
        ("00003.tar.gz", r"00003.tar.gz is no .tar; unpack compressed ones first"),
        ("{00000..99999999}.tar", r"stands for more than 1,000,000 shards"),
        ("{00..99}/{00000..99999}.tar", r"stands for more than 1,000,000 shards"),
        ("{00000..00002.tar", r"00002.tar: Unbalanced braces"),
    ],
)
def test_shards_that_are_not_there_are_refused(shards: str, message: str, folder: Path) -> None:
    with pytest.raises(InputError, match=rf"data.shards=.*{message}"):
        find_shards(f"{folder}/{shards}", "data.shards")


def test_an_empty_list_of_shards_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.val_shards names no shards"):
        find_shards([], "data.val_shards")
