"""Pictures with their captions on a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from efficap.evaluation.attention import Word, central_square, shade, shade_heads
from efficap.files import replacing
from efficap.picture_files import open_picture, orientation_of, read_picture_file, rgb_of

THUMBNAIL = 320  # pixels, the longer side
JPEG_QUALITY = 80
_TURNS = {  # by the orientation of EXIF. Pillow's exif_transpose writes EXIF anew, and fails where a tag is odd
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class GalleryItem:
    """One picture to show.

    Attributes:
        image: its file, or the picture itself.
        caption: the predicted caption.
        references: what people wrote about it.
        words: of the caption, with where the model looked; pointing at one shows it.
        crop: share of the picture's short side that the model saw, in the middle.
    """

    image: Path | Image.Image
    caption: str
    references: Sequence[str] = ()
    words: Sequence[Word] = ()
    crop: float = 1.0


@dataclass(frozen=True, slots=True)
class Page:
    """A page that this program has written, as the value of a notebook's cell: it is shown in a frame below it.

    Attributes:
        file: HTML that needs nothing but itself.
        height: of the frame, pixels.
    """

    file: Path
    height: int = 700

    def _repr_html_(self) -> str:
        page = escape(self.file.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: {self.height}px; border: 0"></iframe>'


def write_gallery(path: Path, items: Iterable[GalleryItem], *, title: str, subtitle: str = "") -> None:
    """Write one HTML page with all pictures inside it: no script, no other file, nothing from the network.

    Items are taken one by one and never held together. The page takes its place when it is complete. A
    picture that cannot be read is shown as a note.

    Args:
        path: the HTML file; its folder is made.
        items: may be a generator over thousands (a thumbnail takes about 20 kB).
        title: of the page.
        subtitle: a line below it, such as the run and its scores.
    """
    count = 0
    with replacing(path) as file:
        file.write(page_head(title).encode(errors="replace"))
        file.write(
            f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n<main>\n".encode(
                "utf-8", "replace"
            )
        )
        for item in items:
            file.write(_figure(item).encode(errors="replace"))
            count += 1
        file.write(f"</main>\n<footer>{count:,} pictures</footer>\n</body>\n</html>\n".encode())


def _figure(item: GalleryItem) -> str:
    references = "".join(f'<li dir="auto">{escape(text)}</li>' for text in item.references)
    plain = f'<p class="caption" dir="auto">{escape(item.caption)}</p>'
    caption = caption_of_words(item.image, item.words, item.crop) if item.words else plain
    return (
        f'<figure><div class="picture">{picture_tag(item.image, item.caption)}</div>'
        f"<figcaption>{caption}"
        + (f"<ul>{references}</ul>" if references else "")
        + "</figcaption></figure>\n"
    )


def page_head(title: str) -> str:
    """The start of a page that may load nothing but the pictures inside it, up to and with ``<body>``."""
    return _HEAD.replace("@TITLE@", escape(title))


def picture_tag(image: Path | Image.Image, alt: str) -> str:
    """A thumbnail with its pixels inside the page, or a note where the picture cannot be read."""
    try:
        thumbnail = load_picture(image, THUMBNAIL)
    except OSError as error:
        return f'<p class="broken">cannot be read: {escape(str(error))}</p>'
    width, height = thumbnail.size
    return f'<img alt="{escape(alt)}" width="{width}" height="{height}" src="{_inlined(thumbnail, "JPEG")}">'


def _inlined(image: Image.Image, form: str) -> str:
    data = io.BytesIO()
    image.save(data, form, quality=JPEG_QUALITY, optimize=True)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def caption_of_words(image: Path | Image.Image, words: Sequence[Word], crop: float) -> str:
    """A caption whose words, pointed at, show where the model looked, and whose shades show where it was unsure.

    It stands in a figure of this page's style, below the picture, and needs no script. Where the picture cannot be read
    the shades alone are shown.
    """
    try:
        picture = load_picture(image, THUMBNAIL)
    except OSError:
        picture = None
    first = words[0].attention
    assert first is not None
    room = 100 * first.shape[0] / first.shape[1] if first.ndim == 4 else 0  # for the heads, in % of the width
    inside = "".join(_word(word, picture, crop) for word in words)
    return f'<p class="caption" dir="auto" style="margin-bottom:{room:.0f}%">{inside}</p>'


def _word(word: Word, picture: Image.Image | None, crop: float) -> str:
    space = " " if word.text[:1].isspace() else ""
    looks = ""
    if picture is not None:
        quarter = max(1, picture.width // 4), max(1, picture.height // 4)  # enlarged again, it stays smooth
        over = shade(word.mean_attention, quarter, crop)
        looks = f'<img class="look" alt="" src="{_inlined(over, "PNG")}">'
        if word.attention is not None and word.attention.ndim == 4:
            heads = shade_heads(word.attention, picture.crop(central_square(*picture.size, crop)))
            looks += f'<img class="heads" alt="" src="{_inlined(heads, "JPEG")}">'
    return (
        f'{space}<span class="word" tabindex="0" title="probability {word.probability:.2f}" '
        f'style="--doubt:{1 - word.probability:.2f}">{escape(word.text.strip())}{looks}</span>'
    )


def load_picture(image: Path | Image.Image, side: int) -> Image.Image:
    """The picture as RGB, upright by its EXIF orientation, on white where transparent, at most `side` pixels.

    Raises:
        OSError: it cannot be read, for whatever reason.
    """
    try:
        if isinstance(image, Image.Image):
            return _upright(image, side)
        with open_picture(read_picture_file(image)) as opened:
            opened.draft("RGB", (side * 2, side * 2))  # a large JPEG is decoded at a fraction of its size
            return _upright(opened, side)
    except Exception as error:  # of many kinds, by format and damage
        raise OSError(str(error) or type(error).__name__) from error


def _upright(image: Image.Image, side: int) -> Image.Image:
    turn = _TURNS.get(orientation_of(image))
    picture = image if turn is None else image.transpose(turn)
    if picture.mode.startswith("I"):
        picture = Image.fromarray(rgb_of(picture))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB")
    if picture is image:
        picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    picture.info = {}  # a comment of the file would be written into the page
    return picture


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f4f5f6; --card: #fff; --ink: #1a1c1e; --soft: #676d73; --line: #dfe2e5
}
@media (prefers-color-scheme: dark) {
  :root { --page: #131517; --card: #1d2023; --ink: #e8eaec; --soft: #9aa1a8; --line: #303438 }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif }
header, main, footer { max-width: 1500px; margin: 0 auto; padding: 24px }
header { padding-bottom: 0 } h1 { margin: 0; font-size: 26px } header p, footer { color: var(--soft) }
main { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)) }
figure {
  position: relative; margin: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; overflow: hidden;
  content-visibility: auto; contain-intrinsic-size: auto 380px
}
.picture { height: 240px; display: grid; place-items: center; background: var(--line) }
img { width: 100%; height: 240px; object-fit: contain; display: block }
figcaption { padding: 12px 16px 14px; overflow-wrap: anywhere }
p { margin: 0 } .caption { font-weight: 600 } ul { margin: 8px 0 0; padding-left: 18px; color: var(--soft) }
.word { border-radius: 3px; background: rgb(226 132 38 / calc(var(--doubt) * 0.8)) }
.word:hover, .word:focus { outline: 2px solid #3a7bd5 }
.look, .heads { display: none; position: absolute; left: 0; top: 0; pointer-events: none }
.word:hover .look, .word:focus .look, .word:hover .heads, .word:focus .heads { display: block }
.heads { inset: auto 16px 10px; width: calc(100% - 32px); height: auto }
.note, .broken { margin-top: 8px; font-size: 13px; color: var(--soft) } .broken { padding: 0 16px }
</style>
</head>
<body>
"""
