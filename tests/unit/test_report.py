import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image, ImageFont
from rich.console import Console

from efficap.errors import InputError
from efficap.evaluation.gallery import THUMBNAIL
from efficap.evaluation.report import GalleryItem, contact_sheet, plot_curves, scores_table, write_gallery
from efficap.evaluation.sheet import wrap
from efficap.training.callbacks import _small

ORIENTATION = 0x0112  # the EXIF tag


class Page(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data

    def pictures(self):
        sources = [value for name, value in self.attributes if name == "src"]
        return [Image.open(io.BytesIO(base64.b64decode(s.partition("base64,")[2]))) for s in sources]


def gallery(tmp_path, items, title="t", subtitle="s"):
    path = tmp_path / "new" / "index.html"
    write_gallery(path, items, title=title, subtitle=subtitle)
    assert list(path.parent.iterdir()) == [path]
    return Page(path.read_text(encoding="utf-8"))


def test_the_gallery_escapes_all_text(tmp_path):
    evil = "<script>alert('x')</script> & \"quoted\" é\ud800"
    item = GalleryItem(Image.new("RGB", (8, 8)), evil, (evil,))
    page = gallery(tmp_path, [item], title=evil, subtitle=evil)
    assert "script" not in page.tags
    assert page.text.count("<script>alert('x')</script> & \"quoted\" é?") == 5
    assert ("alt", evil.replace("\ud800", "?")) in page.attributes


def test_the_gallery_holds_its_pictures_and_asks_for_nothing_else(tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (1000, 500), "red").save(file)
    page = gallery(tmp_path, [GalleryItem(file, "a"), GalleryItem(Image.new("L", (10, 10)), "b")])
    first, second = page.pictures()
    assert first.format == "JPEG"
    assert first.size == (THUMBNAIL, THUMBNAIL // 2)
    assert first.getpixel((5, 5))[0] > 240
    assert second.size == (10, 10)
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    html = (tmp_path / "new" / "index.html").read_text()
    assert not re.search(r"https?:|//|url\(|@import", re.sub(r"base64,[^\"]*", "", html))


def test_a_picture_that_cannot_be_read_becomes_a_note(tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:200])
    items = [
        GalleryItem(tmp_path / "missing.jpg", "one"),
        GalleryItem(tmp_path / "page.jpg", "two"),
        GalleryItem(tmp_path / "cut.jpg", "three"),
        GalleryItem(Image.new("RGB", (8, 8)), "four"),
    ]
    page = gallery(tmp_path, items)
    assert len(page.pictures()) == 1
    assert page.text.count("cannot be read") == 3
    assert all(word in page.text for word in ("one", "two", "three", "four"))


def jpeg(**options):
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(data, "JPEG", **options)
    return data.getvalue()


def test_the_gallery_turns_pictures_by_their_exif_and_puts_transparent_ones_on_white(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    items = [GalleryItem(tmp_path / "turned.jpg", ""), GalleryItem(Image.new("RGBA", (8, 8)), "")]
    turned, transparent = gallery(tmp_path, items).pictures()
    assert turned.size == (20, 40)
    assert min(transparent.getpixel((4, 4))) > 250


def test_a_picture_with_odd_metadata_is_shown_and_its_comment_is_not(tmp_path):
    """As some telephones write it: the altitude's reference as text, of which Pillow makes no EXIF again."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif.get_ifd(0x8825)[5] = b"1"
    odd = exif.tobytes().replace(b"\x05\0\x01\0\x01\0\0\0", b"\x05\0\x02\0\x01\0\0\0")
    Image.new("RGB", (40, 20)).save(tmp_path / "odd.jpg", exif=odd, comment=b"where I live")
    with Image.open(tmp_path / "odd.jpg") as image:
        assert image.info["comment"] == b"where I live"
    [shown] = gallery(tmp_path, [GalleryItem(tmp_path / "odd.jpg", "")]).pictures()
    assert shown.size == (20, 40)
    assert "comment" not in shown.info


def test_the_gallery_shows_the_upper_bits_of_sixteen(tmp_path):
    grey = np.full((8, 8), 100 * 257, np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    [shown] = gallery(tmp_path, [GalleryItem(tmp_path / "grey.png", "")]).pictures()
    assert all(abs(value - 100) <= 2 for value in shown.getpixel((4, 4)))


def test_items_are_streamed_and_a_broken_off_gallery_leaves_the_old_one(tmp_path):
    path = tmp_path / "index.html"
    path.write_text("old")
    shared = Image.new("RGB", (8, 8))

    def items():
        for _ in range(500):
            yield GalleryItem(shared, "a")
        (written,) = tmp_path.glob(".index.html.*")
        assert written.stat().st_size > 100_000  # it is on the disk, not in memory
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gallery(path, items(), title="t")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_contact_sheet_has_a_row_for_each_full_set_of_columns(tmp_path):
    items = [GalleryItem(Image.new("RGB", (30, 20), "red"), "a red area " * 9, ("red",)) for _ in range(5)]
    items.append(GalleryItem(tmp_path / "missing.jpg", "nothing"))
    sizes = []
    for count in (3, 6, 4):
        contact_sheet(tmp_path / "sheet.png", [*items[6 - count :]])
        with Image.open(tmp_path / "sheet.png") as sheet:
            sheet.load()
            sizes.append(sheet.size)
            assert sheet.format == "PNG"
            assert (255, 0, 0) in {colour for _, colour in sheet.getcolors(100_000)}
    assert sizes[0][0] < sizes[1][0] == sizes[2][0]
    assert sizes[1][1] > 1.8 * sizes[2][1]


def test_a_contact_sheet_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least one picture"):
        contact_sheet(tmp_path / "sheet.png", [])


@pytest.mark.parametrize(
    "text", ["a small dog runs over the long grass", "w" * 80, "a " + "w" * 80 + " b", "", "é"]
)
def test_wrapped_lines_fit(text):
    font = ImageFont.load_default(12)
    lines = wrap(text, font, 60, 2)
    assert len(lines) <= 2
    assert all(font.getlength(line) <= 60 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "") or lines[-1].endswith("…")


def png_size(path):
    with Image.open(path) as png:
        png.load()
        return png.size


FULL = """epoch,step,lr-AdamW,train/loss,val/loss,val/CIDEr,val/BLEU-4
0,0,0.001,5.1,,,
0,1,0.001,4.9,,,
0,1,,,4.8,0.1,0.02
1,2,0.001,4.0,,,
1,3,,,4.1,0.3,0.05
"""


def test_curves_have_a_panel_for_losses_and_one_for_scores(tmp_path):
    def size(text):
        (tmp_path / "metrics.csv").write_text(text)
        plot_curves(tmp_path / "metrics.csv", tmp_path / "new" / "curves.png")
        return png_size(tmp_path / "new" / "curves.png")

    wide, height = size(FULL)
    assert size("step,train/loss\n0,5.1\n") == (wide / 2, height)  # one row, one panel
    assert size("step,val/CIDEr\n7,0.1\n") == (wide / 2, height)
    assert size("step,train/loss,val/BLEU-4\n0,5.1,\n1,,0.1\n") == (wide, height)
    # a resumed run repeats steps, a broken one logs nan and inf
    assert size(FULL + "0,1,,4.5,,,\n2,4,,nan,inf,x,\n") == (wide, height)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table"),
        ("epoch,train/loss\n0,1\n", "no column 'step'"),
        ("step,lr\n0,1\n", "no value of train/loss"),
        ("step,train/loss\n", "no value of train/loss"),
    ],
)
def test_a_table_without_curves_is_refused(tmp_path, text, message):
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.csv: cannot be read"):
        plot_curves(tmp_path / "metrics.csv", tmp_path / "curves.png")


def printed(scores):
    console = Console(width=100, file=io.StringIO())
    console.print(scores_table(scores))
    return console.file.getvalue()


def test_the_table_shows_scores_and_why_a_metric_failed():
    failed = dict.fromkeys([f"BLEU-{n}" for n in (1, 2, 3, 4)])
    scores = {
        "split": "test",
        "images": 40,
        **failed,
        "BLEU_error": "out of [red]memory",
        "CIDEr": 0.6,
        "seed": 7,
    }
    text = printed(scores)
    assert "test, 40 images" in text
    assert re.search(r"CIDEr +│ +0\.600 │ 60\.0", text)
    assert text.count("failed") == 4
    assert text.count("out of [red]memory") == 1  # once, and not read as markup
    assert re.search(r"seed +│ +7 ", text)
    assert "reason" not in printed({"CIDEr": 0.6, "near/CIDEr": None, "near/CIDEr_error": "of one picture"})


def test_a_sentence_without_spaces_is_broken_where_the_line_ends():
    font = ImageFont.load_default(12)
    lines = wrap("x" * 20, font, 60, 5)
    assert len(lines) > 1
    assert "".join(lines) == "x" * 20


def test_a_picture_for_wandb_tells_nothing_but_itself(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.0)  # where it was taken
    Image.new("RGB", (1000, 500)).save(tmp_path / "a.jpg", exif=exif)
    shown = _small(tmp_path / "a.jpg").image
    assert shown.size == (THUMBNAIL // 2, THUMBNAIL)
    assert not dict(shown.getexif())
    assert _small(tmp_path / "none.jpg") is None
