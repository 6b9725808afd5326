"""One picture that shows a few pictures with their captions, for a README."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from efficap.errors import InputError
from efficap.evaluation.gallery import UNREADABLE, GalleryItem, load_picture
from efficap.evaluation.results import replacing

INK, SOFT, PANEL = "#1a1c1e", "#70757a", "#eef0f2"
REFERENCE_LINES = 2


@dataclass(frozen=True, slots=True)
class _Cell:
    picture: Image.Image | None  # None: it cannot be read
    caption: list[str]  # wrapped lines
    reference: list[str]


def contact_sheet(
    path: Path, items: Iterable[GalleryItem], *, columns: int = 4, width: int = 320, lines: int = 3
) -> None:
    """Write one PNG with the pictures in a grid, each with its caption below and its first reference in grey.

    The whole picture is shown, on a panel where it is narrower or lower than the others, for a caption may
    speak of its edge. What cannot be read is an empty panel that says so.

    Args:
        path: the PNG file; its folder is made.
        items: a few; all are held in memory.
        columns: pictures side by side, at least 1.
        width: of one picture, pixels, at least 80; its height is at most that.
        lines: that a caption may take, at least 1; what is longer ends with an ellipsis.

    Raises:
        InputError: no items, or a number below its limit.
    """
    for name, value, least in (("columns", columns, 1), ("width", width, 80), ("lines", lines, 1)):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    size = max(11, width // 18)
    font, small = _font(size), _font(size * 5 // 6)
    cells = [_cell(item, width, lines, font, small) for item in items]
    if not cells:
        raise InputError("a contact sheet needs at least one picture")
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    gap, step = max(8, width // 14), size * 4 // 3  # pixels between cells, and from line to line
    # One height for all panels; text only as deep as the longest of its row.
    panel = max((cell.picture.height for cell in cells if cell.picture), default=width * 3 // 4)
    depths = [
        panel + step + step * max(len(cell.caption) + len(cell.reference) for cell in row) for row in rows
    ]
    across = min(columns, len(cells))
    canvas = Image.new("RGB", (gap + across * (width + gap), gap + sum(depths) + gap * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    top = gap
    for row, depth in zip(rows, depths, strict=True):
        for column, cell in enumerate(row):
            left = gap + column * (width + gap)
            _draw_picture(canvas, pen, cell.picture, (left, top, left + width, top + panel), small)
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


def _cell(
    item: GalleryItem, width: int, lines: int, font: ImageFont.FreeTypeFont, small: ImageFont.FreeTypeFont
) -> _Cell:
    try:
        loaded = load_picture(item.image, 4 * width)
        picture = ImageOps.contain(loaded, (width, width), Image.Resampling.LANCZOS)
    except UNREADABLE:
        picture = None
    reference = item.references[0] if item.references else ""
    return _Cell(
        picture, wrap(item.caption, font, width, lines), wrap(reference, small, width, REFERENCE_LINES)
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
    for word in text.split():
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


def _shorten(line: str, font: ImageFont.FreeTypeFont, width: int, *, more: bool) -> str:
    """`line`, with an ellipsis where `more` follows or where it alone is too wide."""
    if not more and font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"
