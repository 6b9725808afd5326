"""Webdataset tars: examined, indexed and read as training does, and as caption.py does."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from PIL import Image

from efficap.commands.caption_shards import TarPictures
from efficap.data.shards.examine import examine
from efficap.data.shards.index import ensure_indexes, index_file, read_header, write_index
from efficap.data.shards.reader import ShardReader
from efficap.data.shards.tar import Broken, read_contents
from efficap.data.text import CaptionText
from efficap.data.transforms import EvaluationTransform
from fuzz.kinds import CAPTIONS, DAMAGE, JSON, Kind, damaged
from fuzz.sandbox import Sandbox

MAX_PIXELS = 1 << 16
KEYS = ["000", "001", "a/b", "../outside/x", "/abs", "a.b", "", "é", "a\nb", "x" * 120, "-", "..", "./000"]
SUFFIXES = [".png", ".jpg", ".txt", ".json", ".JPG", ".gif", ".tiff", ".npy", "", ".pickle"]
TYPES = [tarfile.REGTYPE] * 6 + [
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.CONTTYPE,
    tarfile.GNUTYPE_SPARSE,
]
LINKS = ["../outside/canary.png", "/etc/passwd", "@OUTSIDE@/canary.png", "000.png", ""]


def _encoded(kind: str, side: int = 40) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, 36), "green").save(data, kind)
    return data.getvalue()


def _bomb() -> bytes:
    """A PNG that says that it has four thousand million pixels."""
    header = struct.pack(">IIBBBBB", 1 << 16, 1 << 16, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


PICTURES = [_encoded(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "EPS", "WEBP")]
DATA = (
    st.sampled_from([*PICTURES, *PICTURES[:2], _bomb(), b"", _encoded("PNG", 4000)])
    | CAPTIONS.map(lambda text: text.encode(errors="surrogatepass"))
    | st.dictionaries(
        st.sampled_from(["caption", "captions", "image_id", "key"]), JSON | CAPTIONS, max_size=3
    ).map(lambda fields: json.dumps(fields).encode())
    | st.binary(max_size=40)
)
PAX = st.dictionaries(
    st.sampled_from(
        ["path", "size", "linkpath", "mtime", *(f"GNU.sparse.{key}" for key in ("major", "map", "name"))]
    ),
    st.sampled_from(["../outside/canary.png", "-1", "0", "99999999999999", "nan", "1,2,3", "1", "", "é"]),
    max_size=3,
)


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    sink = io.BytesIO()
    form = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    with tarfile.open(fileobj=sink, mode="w", format=form) as archive:
        for number in range(draw(st.integers(0, 3))):  # good samples around the others
            for suffix, data in (
                (".png", PICTURES[0]),
                (".txt", b"a green picture"),
                (".json", b'{"caption": "x"}'),
            ):
                member = tarfile.TarInfo(f"good{number}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        for _ in range(draw(st.integers(0, 4))):
            _add(draw, archive, form)
    data = sink.getvalue()
    if draw(st.booleans()):
        data = damaged(data, draw(DAMAGE))
    if draw(st.booleans()):
        data = _with_header(draw, data)
    return data


def _add(draw: st.DrawFn, archive: tarfile.TarFile, form: int) -> None:
    data = draw(DATA)
    member = tarfile.TarInfo(draw(st.sampled_from(KEYS)) + draw(st.sampled_from(SUFFIXES)))
    member.size, member.type = len(data), draw(st.sampled_from(TYPES))
    if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        member.linkname = draw(st.sampled_from(LINKS))
    if form == tarfile.PAX_FORMAT:
        member.pax_headers = draw(PAX)
    try:
        archive.addfile(member, io.BytesIO(data))
    except (ValueError, UnicodeError):  # what the format cannot say
        return


def _with_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A field of a member's header changed, with the checksum that belongs to it."""
    if len(data) < 512:
        return data
    block = draw(st.integers(0, len(data) // 512 - 1)) * 512
    at, size = draw(
        st.sampled_from([(124, 12), (156, 1), (0, 100), (257, 8), (136, 12), (345, 155), (157, 100)])
    )
    piece = draw(
        st.sampled_from(
            [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"-1\0", b"S", b"x", b"L", b"K", b"g"]
        )
        | st.binary(min_size=1, max_size=size)
    )[:size]
    header = bytearray(data[block : block + 512])
    header[at : at + len(piece)] = piece
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:block] + bytes(header) + data[block + 512 :]


EXAMPLES = st.tuples(tars(), st.sampled_from([None, "captions", "caption"]), st.none() | DAMAGE)


def use(example: tuple[bytes, str | None, Any], sandbox: Sandbox) -> Callable[[], object]:
    data, caption_field, index_damage = example
    tar = sandbox.root / "00000.tar"
    tar.write_bytes(data)
    text = CaptionText(lowercase=False, final_stop="keep", min_words=None, max_words=None, exclude=None)
    transform = EvaluationTransform(image_size=32, interpolation="bicubic", crop_pct=1.0)

    def read_all() -> None:
        examined = examine(tar, max_pixels=MAX_PIXELS)
        write_index(examined, tar)
        if index_damage is not None:
            index_file(tar, None).write_bytes(damaged(index_file(tar, None).read_bytes(), index_damage))
        header = read_header(tar)
        if header is None:
            return  # it is made anew
        assert ensure_indexes([tar], index_dir=None, max_pixels=MAX_PIXELS, workers=1)
        reader = ShardReader([tar], [header], index_dir=None, caption_field=caption_field, text=text)
        for number in range(min(len(reader), 50)):
            try:
                reader.name(number), reader.read(number)
            except Broken:
                continue
        pictures = TarPictures(tar, read_contents(tar).samples, transform)
        for number in range(len(pictures)):
            pictures[number]

    return read_all


SHARDS = Kind("shards", EXAMPLES, use)
