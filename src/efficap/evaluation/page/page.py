"""An evaluation as one page that needs nothing but itself: no other file, no network, no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from efficap.evaluation.page.charts import curves, histogram
from efficap.evaluation.page.numbers import checks_section, facts, scores_section, verdict
from efficap.evaluation.page.selection import Selection, select
from efficap.evaluation.page.thumbnails import thumbnails
from efficap.evaluation.pictures import PictureRecord
from efficap.files import replacing

PAGE = "report.html"
SHOWN = 12  # pictures in each of the rows: best, worst, random
ROWS = {"best": "Best", "worst": "Worst", "random": "Random"}
ORDERS = {
    "split": "as in the split",
    "best": "best first",
    "worst": "worst first",
    "random": "random",
    "longest": "longest first",
    "shortest": "shortest first",
}


def write_page(
    path: Path,
    *,
    title: str,
    scores: Mapping[str, Any],
    records: Sequence[PictureRecord],
    pictures: Callable[[str], Path | Image.Image],
    limit: int,
    metrics_csv: Path | None = None,
) -> None:
    """Write the page: scores, checks and charts as plain HTML, the pictures laid out by its script as they are seen.

    A picture that cannot be read is shown as a note. Thumbnails are written as they are made and never held together;
    the page takes its place when it is complete.

    Args:
        path: the HTML file; its folder is made.
        title: of the page.
        scores: what scores.json holds; what it lacks is left out.
        records: of the whole split, at least one.
        pictures: gives the picture of an image id.
        limit: the most pictures on the page, at least 1; the histograms show all.
        metrics_csv: of the run's training; without it, or where it has nothing to draw, there are no curves.
    """
    parts = _parts(title, scores, records, pictures, select(records, limit), metrics_csv)
    with replacing(path) as file:
        for part in parts:
            file.write(part.encode(errors="replace"))  # a lone surrogate cannot be written


def _parts(
    title: str,
    scores: Mapping[str, Any],
    records: Sequence[PictureRecord],
    pictures: Callable[[str], Path | Image.Image],
    selection: Selection,
    metrics_csv: Path | None,
) -> Iterator[str]:
    style, script = (
        resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    yield _head(title, style, script)
    yield f"<header><h1>{escape(title)}</h1>{facts(scores)}{verdict(scores)}</header>\n"
    yield f'<div class="columns">{scores_section(scores)}{checks_section(scores)}</div>\n'
    yield curves(metrics_csv)
    yield _histograms(records)
    rows = _rows(selection)
    yield _gallery(len(records), selection, rows)
    failures: dict[int, str] = {}
    small = thumbnails(pictures, [records[number].image_id for number in selection.numbers])
    for number, thumbnail in zip(selection.numbers, small, strict=True):
        if thumbnail.data:
            source = base64.b64encode(thumbnail.data).decode()
            yield f'<script type="text/plain" id="picture{number}">{source}</script>\n'
        else:
            failures[number] = thumbnail.failure
    data = _data(records, selection, rows, failures)
    yield f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script>\n</body>\n</html>\n'


def _rows(selection: Selection) -> dict[str, list[int]]:
    """A few of the best, worst and random pictures by the name of their row; none where all are seen at a glance."""
    if len(selection.numbers) <= len(ROWS) * SHOWN:
        return {}
    lists = {"best": selection.ranked, "worst": selection.ranked[::-1], "random": selection.random}
    return {name: numbers[:SHOWN] for name, numbers in lists.items() if numbers}


def _head(title: str, style: str, script: str) -> str:
    """Up to and with ``<body>``: by its policy the page runs this script alone and loads nothing at all."""
    policy = (
        f"default-src 'none'; img-src data:; style-src {_digest(style)}; script-src {_digest(script)}; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
    )


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _histograms(records: Sequence[PictureRecord]) -> str:
    ciders = [hundredths for record in records if (hundredths := _hundredths(record)) is not None]
    words = [len(record.caption.split()) for record in records]
    beside = [len(text.split()) for record in records for text in record.references]
    return (
        '<section><h2>Captions</h2><div class="columns">'
        + histogram("CIDEr of each picture", "cider", ciders, decimals=2)
        + histogram("Words of each caption", "words", words, beside=beside)
        + "</div></section>\n"
    )


def _gallery(pictures: int, selection: Selection, rows: Mapping[str, list[int]]) -> str:
    """The places of the pictures, which the script fills, and the form that filters them."""
    scored, shown = bool(selection.ranked), len(selection.numbers)
    chosen = "the best, the worst and random ones" if scored else "chosen by chance"
    some = f", {shown:,} of {pictures:,}: {chosen}" if shown < pictures else ""
    orders = ["split", *(["best", "worst"] if scored else []), "random", "longest", "shortest"]
    options = "".join(f'<option value="{name}">{ORDERS[name]}</option>' for name in orders)
    strips = "".join(
        f'<section><h2>{ROWS[name]}</h2><div class="cards strip" id="{name}"></div></section>\n'
        for name in rows
    )
    return (
        "<noscript><section><p>The pictures are laid out by the script of this page, which is switched off here; "
        f"captions.json beside it holds the captions.</p></section></noscript>\n<main>{strips}"
        f"<section><h2>Pictures{some}</h2><form>"
        '<input type="search" name="search" dir="auto" aria-label="search" '
        'placeholder="Words of captions, references, names">'
        f"{_between('CIDEr', 'cider', '0.01', hidden=not scored)}{_between('words', 'words', '1')}"
        f'<label>order <select name="order">{options}</select></label>'
        '<button type="reset">reset</button><output></output></form>'
        '<div class="cards" id="all"></div></section></main>\n'
    )


def _between(label: str, field: str, step: str, *, hidden: bool = False) -> str:
    ends = " to ".join(
        f'<input type="number" name="{field}-{end}" min="0" step="{step}" aria-label="{label} {end}">'
        for end in ("from", "to")
    )
    return f"<label{' hidden' if hidden else ''}>{label} {ends}</label>"


def _data(
    records: Sequence[PictureRecord],
    selection: Selection,
    rows: Mapping[str, list[int]],
    failures: Mapping[int, str],
) -> str:
    """What the script lays out, as JSON that cannot end its element early."""
    shown = [
        {
            "number": number,
            "id": records[number].image_id,
            "caption": records[number].caption,
            "references": list(records[number].references),
            "cider": _hundredths(records[number]),
            "words": len(records[number].caption.split()),
            **({"failure": failures[number]} if number in failures else {}),
        }
        for number in selection.numbers
    ]
    return json.dumps({"records": shown, "ranked": selection.ranked, "rows": rows}).replace("<", "\\u003c")


def _hundredths(record: PictureRecord) -> int | None:
    """CIDEr as the page shows it, times 100."""
    return None if record.scores is None else round(100 * record.scores.cider)
