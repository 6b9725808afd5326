"""Tables of captions, of all formats, read and loaded as training does, and shown on a page."""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from conftest import compose
from hypothesis import strategies as st
from PIL import Image

from efficap.data.csv import CSVDataModule
from efficap.evaluation.gallery import GalleryItem, write_gallery
from efficap.tokenizer import CaptionTokenizer
from fuzz.kinds import CAPTIONS, DAMAGE, JSON, NAMES, Kind, damaged, replaced, with_places
from fuzz.sandbox import SECRET, Sandbox

FORMS = ["csv", "tsv", "parquet", "json", "coco", "karpathy", "token"]
SPLITS = st.sampled_from(["train", "train", "train", "val", "", "restval", "\0"]) | st.text(max_size=4)


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file's name and its bytes."""
    form = draw(st.sampled_from(FORMS))
    harmless = st.sampled_from(["a.png", "b.jpg", "sub/c.png"])
    names = draw(st.sampled_from([harmless] * 4 + [NAMES, NAMES | st.text(max_size=8)]))
    rows = draw(st.lists(st.tuples(names, CAPTIONS, SPLITS), max_size=6))
    if form in ("csv", "tsv"):
        data = _text_table(draw, rows, "," if form == "csv" else "\t")
    elif form == "parquet":
        data = _parquet(draw, rows)
    elif form == "token":
        lines = [f"{name}#{number}\t{caption}" for number, (name, caption, _) in enumerate(rows)]
        data = "\n".join(lines).encode(errors="surrogatepass")
    else:
        content = _json(form, rows)
        if draw(st.integers(0, 3)) == 0:
            content = replaced(content, draw(st.lists(st.integers(0, 5), max_size=5)), draw(JSON))
        data = json.dumps(content, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
        if draw(st.integers(0, 30)) == 0:
            data = b"[" * 100_000
    file = {"coco": "captions_train2017.json", "karpathy": "dataset_x.json", "json": "train.json"}.get(form)
    changes = draw(st.just([]) | st.just([]) | DAMAGE)
    return file or f"results.{form}", damaged(data, changes)


HEADERS = [["file_name", "caption", "split"]] * 12 + [["file_name", "caption"], ["caption"] * 3, [], ["a"]]


def _text_table(draw: st.DrawFn, rows: list[tuple[str, str, str]], separator: str) -> bytes:
    header = draw(st.sampled_from(HEADERS))
    columns = header if len(header) == 3 else ["file_name", "caption", "split"]
    text = io.StringIO()
    pd.DataFrame(rows, columns=columns).to_csv(text, sep=separator, index=False, header=bool(header))
    encoding = draw(st.sampled_from(["utf-8"] * 6 + ["utf-16", "utf-8-sig", "latin-1", "utf-32"]))
    return text.getvalue().encode(encoding, errors="replace")


COLUMNS: dict[str, Callable[[list[str]], Any]] = {
    "text": lambda cells: pa.array(cells, pa.string()),
    "list": lambda cells: pa.array([[cell, None] for cell in cells], pa.list_(pa.string())),
    "dictionary": lambda cells: pa.array(cells, pa.string()).dictionary_encode(),
    "bytes": lambda cells: pa.array([cell.encode() for cell in cells], pa.binary()),
    "number": lambda cells: pa.array(range(len(cells)), pa.int64()),
    "null": lambda cells: pa.nulls(len(cells), pa.string()),
}


def _parquet(draw: st.DrawFn, rows: list[tuple[str, str, str]]) -> bytes:
    columns: dict[str, Any] = {}
    for place, name in enumerate(("file_name", "caption", "split")):
        cells = [row[place].encode(errors="replace").decode() for row in rows]
        form = draw(
            st.sampled_from(["text"] * 20 + ["list", "dictionary", "bytes", "number", "null", "missing"])
        )
        if form != "missing":
            columns[name] = COLUMNS[form](cells)
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _json(form: str, rows: list[tuple[str, str, str]]) -> Any:
    if form == "json":
        return [{"image": name, "caption": caption} for name, caption, _ in rows]
    if form == "coco":
        return {
            "images": [{"id": number, "file_name": name} for number, (name, _, _) in enumerate(rows)],
            "annotations": [{"image_id": number, "caption": row[1]} for number, row in enumerate(rows)],
        }
    return {
        "images": [
            {"filename": name, "filepath": "sub", "split": split, "sentences": [{"raw": caption}]}
            for name, caption, split in rows
        ]
    }


@functools.cache
def _settings() -> dict[str, Any]:
    overrides = ["data=csv", "data.table=t", "data.image_dir=images", "name=x", "output_dir=."]
    settings = compose("train", *overrides)["data"]
    return {**settings, "num_workers": 0, "max_bad_fraction": 1.0, "batch_size": 4}


@functools.cache
def _tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.learn(["a red picture"], 300)


def write_pictures(folder: Path, outside: Path) -> None:
    """A folder of pictures in which some are none, are links, or a pipe that nobody writes to."""
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 36), "red").save(folder / "a.png")
    Image.new("RGB", (40, 36), "blue").save(folder / "b.jpg")
    Image.new("L", (16, 36)).save(folder / "sub" / "c.png")
    (folder / "link.png").symlink_to(outside / "canary.png")
    (folder / "inner.png").symlink_to("a.png")
    (folder / "folder").symlink_to(outside)
    os.mkfifo(folder / "pipe.png")


def use(example: tuple[str, bytes], sandbox: Sandbox) -> Callable[[], object]:
    name, data = example
    write_pictures(sandbox.root / "images", sandbox.outside)
    (sandbox.root / name).write_bytes(data.replace(b"@OUTSIDE@", str(sandbox.outside).encode()))
    (sandbox.root / "train.txt").write_text("a.png b.jpg sub/c.png ../outside/canary.png link.png")
    settings = with_places({**_settings(), "table": str(sandbox.root / name)}, sandbox)
    del settings["_target_"]
    settings["image_dir"] = str(sandbox.root / "images")
    tokenizer = _tokenizer()

    def read_and_show() -> None:
        module = CSVDataModule(**settings)
        module.prepare(tokenizer, image_size=32, interpolation="bicubic", crop_pct=1.0, splits=["train"])
        items = []
        for batch in module.evaluation_dataloader("train"):
            if batch is None:
                continue
            for image_id, references in zip(batch.image_ids, batch.references or [], strict=True):
                items.append(GalleryItem(module.picture("train", image_id), references[0], references))
        page = sandbox.root / "page.html"
        write_gallery(page, items, title="t")
        html = page.read_text()
        assert "<script" not in html.lower()
        assert SECRET not in html

    return read_and_show


TABLES = Kind("tables", tables(), use)
