"""``POST /caption`` of the demo's server, through a real socket: answers, limits, and thirty kinds of bad upload."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import write_colour_table, write_random_run
from demo_server import Served, served
from PIL import Image

from efficap import Captioner
from efficap.training.writer import WrittenCaption

# Not imported for it: gradio takes seconds, of each process that collects tests.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="the demo's packages are not installed: pip install 'efficap[demo]'",
)

MAX_BYTES, MAX_PIXELS = 100_000, 250_000
LIMITS = [f"max_bytes={MAX_BYTES}", f"max_pixels={MAX_PIXELS}", "max_seconds=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("demo_api") / "colours")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Path]:
    return [
        write_random_run(folder.parent / "m1"),
        write_random_run(folder.parent / "m2", "name=other", "model.image_size=96"),
    ]


@pytest.fixture(scope="module")
def server(folder: Path, runs: list[Path]) -> Iterator[Served]:
    with served(folder.parent / "uploads", runs, *LIMITS) as server:
        yield server


def wait_until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture
def good(folder: Path) -> bytes:
    return (folder / "images" / "test_1.jpg").read_bytes()


def encoded(kind: str, size: tuple[int, int] = (60, 40), mode: str = "RGB", **options: Any) -> bytes:
    picture = Image.effect_noise(size, 60).convert(mode)
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"", *, text: bytes = b"", spoil: bool = False) -> bytes:
    """A PNG whose header says what is asked of it, whatever its data are; `text` is packed into it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content) ^ spoil
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    packed = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(text)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + header + packed + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def large_jpeg() -> bytes:
    data = bytearray(encoded("JPEG", mode="L"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def large_gif() -> bytes:
    data = bytearray(encoded("GIF", mode="L"))
    data[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(data)


def large_webp() -> bytes:
    canvas = (16_383 - 1).to_bytes(3, "little")
    chunk = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + canvas
    frame = encoded("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunk) + len(frame)) + b"WEBP" + chunk + frame


def large_bmp() -> bytes:
    data = bytearray(encoded("BMP"))
    data[18:26] = struct.pack("<ii", 60_000, 60_000)
    return bytes(data)


BAD: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "nothing": (lambda: b"", 422, "empty"),
    "one byte": (lambda: b"\xff", 422, "no picture"),
    "zeros": (lambda: bytes(5000), 422, "no picture"),
    "noise": (lambda: random.Random(0).randbytes(5000), 422, "no picture"),
    "text": (lambda: b"a brown dog runs on the beach", 422, "no picture"),
    "HTML": (lambda: b"<!doctype html><img src=x onerror=alert(1)>", 422, "no picture"),
    "JSON": (lambda: json.dumps({"image": "data:image/png;base64,AAAA"}).encode(), 422, "no picture"),
    "SVG": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        422,
        "no picture",
    ),
    "PDF": (lambda: b"%PDF-1.7\n1 0 obj\n<< >>\nendobj\n", 422, "no picture"),
    "PostScript": (lambda: encoded("EPS"), 422, "no picture"),
    "ZIP": (lambda: b"PK\x03\x04" + bytes(100), 422, "no picture"),
    "ELF": (lambda: b"\x7fELF" + bytes(100), 422, "no picture"),
    "pickle": (lambda: b"\x80\x04cos\nsystem\n(S'true'\ntR.", 422, "no picture"),
    "film": (lambda: b"\x00\x00\x00\x20ftypisom" + bytes(100), 422, "no picture"),
    "TIFF, a picture that is not taken": (lambda: encoded("TIFF"), 422, "no picture"),
    "PPM, a picture that is not taken": (lambda: encoded("PPM"), 422, "no picture"),
    "file name": (lambda: b"/etc/passwd", 422, "no picture"),
    "address": (lambda: b"http://127.0.0.1/picture.jpg", 422, "no picture"),
    "JPEG, half of it": (lambda: encoded("JPEG", (300, 300))[:9000], 422, "truncated"),
    "JPEG, its header": (lambda: encoded("JPEG")[:20], 422, "no picture"),
    "JPEG of 4 gigapixels": (large_jpeg, 422, "too large"),
    "PNG, half of it": (lambda: encoded("PNG")[:1000], 422, "truncated"),
    "PNG, its signature": (lambda: b"\x89PNG\r\n\x1a\n", 422, "no picture"),
    "PNG of 10 gigapixels": (lambda: png(100_000, 100_000), 422, "too large"),
    "PNG of no pixels": (lambda: png(0, 0), 422, "no picture"),
    "PNG with a wrong checksum": (lambda: png(4, 4, spoil=True), 422, "no picture"),
    "PNG with spoilt data": (lambda: png(4, 4, b"no zlib"), 422, "unreadable"),
    "PNG with text that inflates": (lambda: png(4, 4, text=bytes(80_000_000)), 422, "too large"),
    "GIF, its header": (lambda: encoded("GIF")[:13], 422, "no picture"),
    "GIF of 4 gigapixels": (large_gif, 422, "too large"),
    "WebP, half of it": (lambda: encoded("WEBP")[:600], 422, "unreadable"),
    "WebP of 268 megapixels": (large_webp, 422, ""),
    "BMP of 3.6 gigapixels": (large_bmp, 422, "too large"),
    "BMP, half of it": (lambda: encoded("BMP")[:1000], 422, "truncated"),
    "PNG of 12,000 pixels in a row": (lambda: encoded("PNG", (12_000, 1), "1"), 422, "too narrow"),
    "more pixels than are taken": (lambda: encoded("PNG", (501, 500), "1"), 422, "too large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_upload_gets_its_answer_and_takes_no_memory(name: str, server: Served) -> None:
    make, status, words = BAD[name]
    data = make()
    Path("/proc/self/clear_refs").write_text("5")  # what is taken now is the most so far
    before = most_taken()
    found, answer = server.caption(data)
    assert (found, list(answer)) == (status, ["detail"])
    assert words in answer["detail"]
    assert most_taken() - before < 200_000


def most_taken() -> int:
    """Kilobytes of main memory, as Linux counts them."""
    [line] = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def test_a_good_picture_of_each_kind_is_captioned_after_all_that(server: Served) -> None:
    for kind, mode in (
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("PNG", "RGBA"),
        ("WEBP", "RGB"),
        ("GIF", "P"),
        ("BMP", "L"),
    ):
        status, answer = server.caption(encoded(kind, mode=mode))
        assert status == 200, answer
        assert (answer["width"], answer["height"]) == (60, 40)


def test_a_form_is_told_to_be_the_picture_itself(server: Served, good: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    status, _, body = server.ask("POST", "/caption", b"--x\r\n\r\n" + good, headers)
    assert status == 422
    assert "send the picture itself" in json.loads(body)["detail"]


def test_too_many_bytes_are_refused_announced_or_not(server: Served) -> None:
    assert server.ask("POST", "/caption", bytes(MAX_BYTES + 1))[0] == 413
    assert server.ask("POST", "/caption", bytes(MAX_BYTES))[0] == 422
    pieces = (bytes(1000) for _ in range(MAX_BYTES // 1000 + 2))
    headers = {"Transfer-Encoding": "chunked"}
    assert server.ask("POST", "/caption", pieces, headers, chunked=True)[0] == 413


def test_a_picture_that_does_not_arrive_is_given_up(server: Served, good: bytes) -> None:
    status, _, body = server.ask("POST", "/caption", good, {"Content-Length": str(len(good) + 1)})
    assert status == 408
    assert "did not arrive in 1 s" in json.loads(body)["detail"]


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"decoding": "beam", "num_beams": 11}, "num_beams=11 must be at most 10 here"),
        ({"decoding": "beam", "num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"decoding": "nucleus", "num_return_sequences": 11}, "num_return_sequences=11 must be at most 10"),
        ({"max_tokens": 1000}, "max_tokens=1000 must be at most 64"),
        ({"max_tokens": 64, "prefix": "xy" * 40}, "prefix"),
        ({"decoding": "greedy", "num_beams": 3}, "num_beams=3 is no option of decoding=greedy"),
        ({"decoding": "greedy", "banned": ["word"] * 11}, "at most 10 are taken"),
        ({"decoding": "greedy", "prefix": "a" * 101}, "at most 100 letters"),
        ({"decoding": "constrained", "required": ["red", "xyz" * 20]}, "must leave room"),
        ({"decoding": "nucleus", "temperature": "nan"}, "temperature"),
        ({"evidence": 0.5}, "learned to tell captions unread"),
        ({"evidence": 11}, "evidence=11"),
        ({"run": "../m1"}, "run=../m1 must be one of test, other"),
        ({"num_beam": 3}, "num_beam"),
        ({"decoding": "../beam"}, "decoding"),
        ({"batch_size": 1000}, "batch_size"),
    ],
)
def test_settings_that_cannot_be_or_ask_for_too_much_are_refused(
    question: dict[str, Any], words: str, server: Served, good: bytes
) -> None:
    status, answer = server.caption(good, **question)
    assert status == 422
    assert words in json.dumps(answer["detail"])


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"decoding": "beam", "num_beams": 3, "num_return_sequences": 2, "max_tokens": 12},
        {"decoding": "greedy", "max_tokens": 8, "attention": True},
    ],
)
def test_the_answer_is_what_the_captioner_says(
    question: dict[str, Any], server: Served, folder: Path, runs: list[Path]
) -> None:
    picture = folder / "images" / "test_2.jpg"
    for name, run in zip(("test", "other"), runs, strict=True):
        status, answer = server.caption(picture.read_bytes(), run=name, **question)
        assert status == 200, answer
        [expected] = Captioner.from_pretrained(run, accelerator="cpu").write(picture, **question)
        assert answer["run"] == name
        assert [caption["text"] for caption in answer["captions"]] == [caption.text for caption in expected]
        for caption, other in zip(answer["captions"], expected, strict=True):
            assert caption["tokens"] == other.tokens
            assert caption["score"] == pytest.approx(other.score, abs=1e-4)
            assert caption["token_log_probs"] == pytest.approx(other.token_log_probs, abs=1e-4)
            assert "".join(word["text"] for word in caption["words"]) == other.text.replace(" ", "")
            for word in caption["words"]:
                assert (word["attention"] is not None) == ("attention" in question)
                if word["attention"]:
                    assert sum(map(sum, word["attention"])) == pytest.approx(1, abs=1e-4)


def test_those_who_ask_at_once_share_a_batch_and_get_their_own_captions(
    server: Served, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [file.read_bytes() for file in sorted((folder / "images").iterdir())] * 2
    alone = [server.caption(picture) for picture in pictures]
    sizes: list[int] = []
    queue = server.service._queue
    work, go = queue._work, threading.Event()

    def counted(job: Any, items: Any) -> Any:
        sizes.append(len(items))
        assert go.wait(20)
        return work(job, items)

    monkeypatch.setattr(queue, "_work", counted)
    with ThreadPoolExecutor(len(pictures)) as threads:
        asked = threads.map(server.caption, pictures)
        wait_until(lambda: sizes and len(queue._waiting) + sizes[0] == len(pictures))
        go.set()
        for (status, answer), (_, expected) in zip(asked, alone, strict=True):
            assert status == 200
            assert [c["text"] for c in answer["captions"]] == [c["text"] for c in expected["captions"]]
    assert sum(sizes) == len(pictures)
    assert max(sizes) == 16  # max_batch of conf/demo.yaml


def test_too_many_at_once_are_told_to_come_back(folder: Path, runs: list[Path], good: bytes) -> None:
    with served(folder.parent / "uploads", runs[:1], "max_requests=2") as server:
        queue = server.service._queue
        work, go = queue._work, threading.Event()

        def slow(job: Any, items: Any) -> list[list[WrittenCaption]]:
            assert go.wait(20)
            return list(work(job, items))

        queue._work = slow
        with ThreadPoolExecutor(2) as threads:
            asked = [threads.submit(server.caption, good) for _ in range(2)]
            wait_until(lambda: queue._taken == 2)
            status, headers, body = server.ask("POST", "/caption", good)
            go.set()
            assert [answer.result()[0] for answer in asked] == [200, 200]
        assert status == 503
        assert int(headers["retry-after"]) >= 1
        assert "try again" in json.loads(body)["detail"]
        assert server.caption(good)[0] == 200


def test_the_description_names_the_answers_and_its_page_needs_no_other_host(server: Served) -> None:
    description = json.loads(server.ask("GET", "/openapi.json")[2])
    route = description["paths"]["/caption"]["post"]
    assert set(route["responses"]) == {"200", "408", "413", "422", "503"}
    assert "Retry-After" in route["responses"]["503"]["headers"]
    assert {"run", "decoding", "attention", "num_beams"} <= {p["name"] for p in route["parameters"]}
    status, headers, page = server.ask("GET", "/docs")
    assert status == 200
    assert b"https://" not in page
    assert "default-src 'self'" in headers["content-security-policy"]
