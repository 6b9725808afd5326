"""report.html as it lies on the disk; tests/integration/test_page_in_browser.py opens it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficap.evaluation.page.charts import histogram
from efficap.evaluation.page.page import write_page
from efficap.evaluation.page.selection import select
from efficap.evaluation.page.thumbnails import AT_ONCE, SIDE, thumbnails
from efficap.evaluation.pictures import PictureRecord
from efficap.evaluation.scores import PictureScores
from efficap.evaluation.sums import BLEU_COUNTS

EVIL = "</script><script>attacked = 1</script><!-- <img src=x onerror=attack()> & \"quoted\" 'é' \ud800"


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts and of all else."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text, self.style = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif self.cdata_elem == "style":
            self.style += data
        else:
            self.text += data

    def data(self):
        return json.loads(next(text for attributes, text in self.scripts if attributes.get("id") == "data"))


def record(number: int, caption: str = "a red dog", cider: float | None = 1.0, **changes) -> PictureRecord:
    scores = None if cider is None else PictureScores(cider, (0,) * BLEU_COUNTS)
    return PictureRecord(
        f"picture {number}", caption, **{"references": ["a dog"], "scores": scores, **changes}
    )


def written(folder: Path, records, scores=None, *, limit=100, **options) -> Page:
    picture = Image.new("RGB", (300, 200), "red")
    settings = {"title": "run: test", "pictures": lambda _: picture, **options}
    path = folder / "new" / "report.html"
    write_page(path, scores=scores or {}, records=records, limit=limit, **settings)
    assert list(path.parent.iterdir()) == [path]
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_runs_its_own_script_alone_and_asks_for_nothing(tmp_path):
    page = written(tmp_path, [record(n) for n in range(3)])
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    (script,) = [text for attributes, text in page.scripts if "type" not in attributes]
    for rule, text in (("script-src", script), ("style-src", page.style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"
    assert {"link", "iframe", "object"}.isdisjoint(tag for tag, _ in page.elements)
    assert not any(name.startswith("on") or name == "style" for _, a in page.elements for name in a)
    assert not re.search(r"https?:|//\w|url\(|@import|innerHTML", re.sub(r"[\w+/]{60,}=*", "", page.html))


def test_no_text_of_any_source_becomes_markup(tmp_path):
    scores = {
        "decoding": EVIL, EVIL: 0.5, "METEOR": None, "METEOR_error": EVIL, f"{EVIL}/CIDEr": 0.1, "signature": EVIL,
        "ensemble": EVIL, "checks": {"verdict": EVIL},
    }  # fmt: skip
    records = [record(0, EVIL, references=[EVIL]), record(1, image=Path("x"))]

    def missing(image_id: str):
        raise OSError(EVIL)

    page = written(tmp_path, records, scores, title=EVIL, pictures=missing)
    assert len(page.scripts) == 2  # its data and its own
    assert not any(tag == "img" for tag, _ in page.elements)
    readable = EVIL.replace("\ud800", "?")
    assert page.text.count(readable) == 7
    first = page.data()["records"][0]
    assert (first["caption"], first["references"], first["failure"]) == (EVIL, [EVIL], EVIL)


def test_scores_have_intervals_and_failed_ones_their_reason(tmp_path):
    scores = {
        "split": "test", "images": 3, **dict.fromkeys(("BLEU-1", "BLEU-4")), "BLEU_error": "out of memory",
        "CIDEr": 1.234, "CIDEr-shuffled": 0.1, "in-domain/CIDEr": 0.5, "far/METEOR": None,
        "far/METEOR_error": "no Java", "intervals": {"CIDEr": [1.1, 1.4]}, "signature": "v1|seed:7",
        "checks": {"verdict": "no", "loss": 2.0, "loss_shuffled": 2.01, "loss_gap": 0.01, "distinct": 0.125,
                   "reference_distinct": 1.0, "vocabulary": 1234},
    }  # fmt: skip
    html = written(tmp_path, [record(0)], scores).html
    assert '<p class="verdict no">The model does not look at the picture (loss gap 0.01)</p>' in html
    assert "<th>CIDEr</th><td>1.234</td><td>1.100 to 1.400</td><td>123.4</td>" in html
    assert html.count("failed: out of memory") == 2
    assert '<th dir="auto">in-domain</th><td>0.500</td><td>-</td>' in html
    assert "far/METEOR failed: no Java" in html
    assert "<td>2.00</td><td>of the references; 2.01 beside other pictures</td>" in html
    assert "<td>12.5 %</td><td>references: 100.0 %</td>" in html
    assert "<td>1,234</td><td></td>" in html
    assert "<code>v1|seed:7</code>" in html


def test_what_is_not_known_is_left_out(tmp_path):
    page = written(tmp_path, [record(0, cider=None)])
    assert not any(
        word in page.text for word in ("Scores", "Checks", "Training", "CIDEr of each", "best first")
    )
    assert page.data()["ranked"] == []
    assert page.data()["records"][0]["cider"] is None


@pytest.mark.parametrize("text", [None, "", "step,lr\n1,2\n", "\xff\x00", "step,train/loss\n1,2.5\n2,2\n"])
def test_curves_are_there_where_a_table_of_them_is(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    page = written(tmp_path, [record(0)], metrics_csv=tmp_path / "metrics.csv")
    sources = [a["src"] for tag, a in page.elements if tag == "img"]
    assert bool(sources) == ("Training" in page.text) == bool(text and "train/loss" in text)
    for source in sources:
        png = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        assert png.convert("RGBA").getpixel((0, 0))[3] == 0  # whatever the page's colour is shows through


def test_rows_hold_the_best_and_the_worst_by_their_exact_score(tmp_path):
    ciders = np.random.default_rng(0).permutation(100) / 1000  # several are the same when rounded
    page = written(tmp_path, [record(n, cider=float(cider)) for n, cider in enumerate(ciders)])
    rows = page.data()["rows"]
    assert rows["best"] == np.argsort(-ciders)[:12].tolist()
    assert rows["worst"] == np.argsort(ciders)[:12].tolist()
    assert len(set(rows["random"])) == 12
    assert written(tmp_path, [record(n) for n in range(36)]).data()["rows"] == {}  # all are seen at a glance


def test_of_a_large_split_the_best_the_worst_and_the_same_random_pictures_are_shown(tmp_path):
    one, other = (
        [record(n, cider=float(c)) for n, c in enumerate(scores)]
        for scores in (range(100), range(100, 0, -1))
    )
    first, second = select(one, 30), select(other, 30)
    assert first.random == second.random
    assert len(first.random) == 10
    assert {*range(90, 100), *range(10), *first.random} == set(first.numbers)
    assert first.ranked == sorted(first.numbers, reverse=True)
    assert first.ranked == second.ranked[::-1]
    unscored = select([record(n, cider=None) for n in range(100)], 30)
    assert (len(unscored.numbers), unscored.ranked) == (30, [])
    assert select(one, 1).numbers == first.random[:1]
    page = written(tmp_path, one, limit=30)
    assert f"{len(first.numbers)} of 100: the best, the worst and random ones" in page.text
    assert sum("picture" in (a.get("id") or "") for a, _ in page.scripts) == len(first.numbers)


@pytest.mark.parametrize("spread", [1, 25, 300, 1000])
def test_bars_hold_what_their_filters_say(spread):
    values = np.random.default_rng(spread).integers(0, spread, 500)
    html = histogram("CIDEr", "cider", values.tolist(), decimals=2)
    bars = re.findall(r'data-from="([\d.]+)" data-to="([\d.]+)"><title>.*?: ([\d.]+) %', html)
    assert 1 <= len(bars) <= 40
    for low, high, percent in bars:
        inside = (values >= round(100 * float(low))) & (values <= round(100 * float(high)))
        assert abs(100 * inside.mean() - float(percent)) < 0.051
    assert sum(float(percent) for *_, percent in bars) == pytest.approx(100, abs=2)


def test_one_very_long_reference_does_not_flatten_the_histogram():
    html = histogram("words", "words", [8, 9, 10] * 100, beside=[*[7, 9, 12] * 300, 5000])
    assert 'data-from="12" data-to=""' in html
    assert "12 or more: 0.0 % (references 33.4 %)" in html


def test_thumbnails_keep_their_order_and_what_cannot_be_read_its_place(tmp_path):
    (tmp_path / "bad.jpg").write_text("<html>")
    for shade in (0, 120, 240):
        Image.new("L", (600, 300), shade).save(tmp_path / f"{shade}.png")

    def picture(image_id: str) -> Path:
        if image_id == "absent":
            raise OSError("no such sample")
        return tmp_path / image_id

    names = ["0.png", "bad.jpg", "120.png", "absent", *["240.png"] * AT_ONCE]
    small = list(thumbnails(picture, names))
    assert [bool(one.data) for one in small] == [True, False, True, False, *[True] * AT_ONCE]
    assert "cannot identify" in small[1].failure
    assert small[3].failure == "no such sample"
    shades = []
    for one in (small[0], small[2], small[-1]):
        image = Image.open(io.BytesIO(one.data))
        assert (image.format, image.size) == ("WEBP", (SIDE, SIDE // 2))
        shades.append(image.convert("L").getpixel((9, 9)))
    assert shades == pytest.approx([0, 120, 240], abs=3)


def test_a_page_that_is_broken_off_leaves_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")

    def stopped(image_id: str):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_page(path, title="", scores={}, records=[record(0)], pictures=stopped, limit=1)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
