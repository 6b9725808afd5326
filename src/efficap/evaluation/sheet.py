"""One picture that shows a few pictures with their captions, for a README."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from efficap.errors import InputError
from efficap.evaluation.gallery import GalleryItem, load_picture
from efficap.files import replacing

INK, SOFT, PANEL = "#1a1c1e", "#70757a", "#eef0f2"
COLUMNS = 4
WIDTH = 320  # of a picture, pixels; its height is at most that
SIZE = 17  # of the captions' letters, pixels
LINES = 3  # of a caption; what is longer ends with an ellipsis
REFERENCE_LINES = 2


@dataclass(frozen=True, slots=True)
class _Cell:
    picture: Image.Image | None  # None: it cannot be read
    caption: list[str]  # wrapped lines
    reference: list[str]


def contact_sheet(path: Path, items: Iterable[GalleryItem]) -> None:
    """Write one PNG with the pictures in a grid, each with its caption below and its first reference in grey.

    The whole picture is shown, on a panel where it is narrower or lower than the others, for a caption may
    speak of its edge. What cannot be read is an empty panel that says so.

    Args:
        path: the PNG file; its folder is made.
        items: a few; all are held in memory.

    Raises:
        InputError: no items.
    """
    font, small = _font(SIZE), _font(SIZE * 5 // 6)
    cells = [_cell(item, font, small) for item in items]
    if not cells:
        raise InputError("a contact sheet needs at least one picture")
    rows = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    gap, step = WIDTH // 14, SIZE * 4 // 3  # pixels between cells, and from line to line
    # One height for all panels; text only as deep as the longest of its row.
    panel = max((cell.picture.height for cell in cells if cell.picture), default=WIDTH * 3 // 4)
    depths = [
        panel + step + step * max(len(cell.caption) + len(cell.reference) for cell in row) for row in rows
    ]
    across = min(COLUMNS, len(cells))
    canvas = Image.new("RGB", (gap + across * (WIDTH + gap), gap + sum(depths) + gap * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    top = gap
    for row, depth in zip(rows, depths, strict=True):
        for column, cell in enumerate(row):
            left = gap + column * (WIDTH + gap)
            _draw_picture(canvas, pen, cell.picture, (left, top, left + WIDTH, top + panel), small)
            text = top + panel + step // 2
            _draw_lines(pen, cell.caption, (left, text), font, INK, step)
            below = text + step * len(cell.caption) + step // 4
            _draw_lines(pen, cell.reference, (left, below), small, SOFT, step)
        top += depth + gap
    with replacing(path) as file:
        canvas.save(file, "PNG", optimize=True)


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    # DejaVu comes with matplotlib and has Latin, Greek, Cyrillic and more; Pillow's own font is Latin only.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _cell(item: GalleryItem, font: ImageFont.FreeTypeFont, small: ImageFont.FreeTypeFont) -> _Cell:
    try:
        loaded = load_picture(item.image, 4 * WIDTH)
        picture = ImageOps.contain(loaded, (WIDTH, WIDTH), Image.Resampling.LANCZOS)
    except OSError:
        picture = None
    reference = item.references[0] if item.references else ""
    return _Cell(
        picture, wrap(item.caption, font, WIDTH, LINES), wrap(reference, small, WIDTH, REFERENCE_LINES)
    )


def _draw_picture(
    canvas: Image.Image,
    pen: ImageDraw.ImageDraw,
    picture: Image.Image | None,
    box: tuple[int, int, int, int],
    font: ImageFont.FreeTypeFont,
) -> None:
    left, top, right, bottom = box
    pen.rectangle((left, top, right - 1, bottom - 1), fill=PANEL)
    middle = (left + right) // 2, (top + bottom) // 2
    if picture is None:
        pen.text(middle, "cannot be read", font=font, fill=SOFT, anchor="mm")
    else:
        canvas.paste(picture, (middle[0] - picture.width // 2, middle[1] - picture.height // 2))


def _draw_lines(
    pen: ImageDraw.ImageDraw,
    lines: list[str],
    corner: tuple[int, int],
    font: ImageFont.FreeTypeFont,
    colour: str,
    step: int,
) -> None:
    left, top = corner
    for index, words in enumerate(lines):
        pen.text((left, top + index * step), words, font=font, fill=colour)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; an ellipsis ends what does not fit."""
    done: list[str] = []
    line = ""
    for word in _pieces(text, font, width):
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width or not line:
            line = longer
        else:
            done.append(line)
            line = word
    done += [line] if line else []
    last = lines - 1
    return [
        _shorten(words, font, width, more=index == last and len(done) > lines)
        for index, words in enumerate(done[:lines])
    ]


def _pieces(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """Its words; those that are too wide, such as a sentence in Chinese, in parts that are not."""
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            fits = max(
                1,
                bisect.bisect(range(1, len(word)), width, key=lambda n: math.ceil(font.getlength(word[:n]))),
            )
            yield word[:fits]
            word = word[fits:]
        yield word


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int, *, more: bool) -> str:
    """`line`, with an ellipsis where `more` follows or where it alone is too wide."""
    if not more and font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
