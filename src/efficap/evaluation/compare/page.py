"""A comparison as one page that needs nothing but itself: tables, plots, and the pictures that tell models apart."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from efficap.evaluation.compare.differing import Differing
from efficap.evaluation.compare.table import Cells
from efficap.evaluation.gallery import page_head, picture_tag
from efficap.evaluation.pictures import PictureRecord
from efficap.files import replacing


def write_page(
    path: Path,
    *,
    title: str,
    tables: Sequence[Cells],
    remarks: Sequence[str],
    plots: Sequence[tuple[str, Path]],
    differing: Sequence[tuple[str, Differing]],
) -> None:
    """Write the page.

    Args:
        path: the HTML file; its folder is made.
        title: of the page.
        tables: one below the other.
        remarks: sentences about them.
        plots: heading and PNG file of each.
        differing: split and pictures of each gallery.
    """
    with replacing(path) as file:
        file.write(page_head(title).encode(errors="replace"))
        file.write(
            f"<style>{_STYLE}</style>\n<header><h1>{escape(title)}</h1></header>\n".encode("utf-8", "replace")
        )
        sections = [
            f"<section>{''.join(map(_table, tables))}{_remarks(remarks)}</section>",
            *map(_plot, plots),
        ]
        for section in sections:
            file.write(f"{section}\n".encode(errors="replace"))
        for split, gallery in differing:
            file.write(_heading(split, gallery).encode(errors="replace"))
            for pair in gallery.pictures:
                file.write(_figure(gallery, *pair).encode(errors="replace"))
            file.write(b"</main>\n")
        file.write(b"</body>\n</html>\n")


def _table(cells: Cells) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in cells.header)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=best' if (number, column) in cells.best else ''}>{_cell(text)}</td>"
            for column, text in enumerate(row)
        )
        + "</tr>"
        for number, row in enumerate(cells.rows)
    )
    return (
        f"<h2>{escape(cells.title)}</h2><div class=wide><table class=left{cells.left}>"
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """The interval of a score goes below it, smaller."""
    score, bracket, bounds = text.partition(" [")
    return f"{escape(score)}<small>[{escape(bounds)}</small>" if bracket else escape(text)


def _remarks(remarks: Sequence[str]) -> str:
    return f"<ul class=remarks>{''.join(f'<li>{escape(remark)}</li>' for remark in remarks)}</ul>"


def _plot(plot: tuple[str, Path]) -> str:
    heading, png = plot
    source = base64.b64encode(png.read_bytes()).decode()
    return (
        f"<section><h2>{escape(heading)}</h2>"
        f'<img class=plot alt="{escape(heading)}" src="data:image/png;base64,{source}"></section>'
    )


def _heading(split: str, gallery: Differing) -> str:
    seeds = [
        f"{group.name}: seed {group.evaluated(split)[0].seed}"
        for group in (gallery.first, gallery.second)
        if len(group.evaluated(split)) > 1
    ]
    return (
        f"<section><h2>{escape(split)}: where {escape(gallery.first.name)} and {escape(gallery.second.name)} "
        f"differ most</h2><p class=remarks>CIDEr of each picture, times 100. {escape('; '.join(seeds))}</p></section>\n"
        "<main>\n"
    )


def _figure(gallery: Differing, one: PictureRecord, other: PictureRecord) -> str:
    if one.image is None:
        picture = f'<p class="broken">{escape(one.image_id)} has no file of its own</p>'
    else:
        picture = picture_tag(one.image, one.caption)
    captions = "".join(
        f'<p class="model">{escape(group.name)}<b>{100 * record.scores.cider:.0f}</b></p>'
        f'<p class="caption" dir="auto">{escape(record.caption)}</p>'
        for group, record in ((gallery.first, one), (gallery.second, other))
        if record.scores
    )
    references = "".join(f'<li dir="auto">{escape(text)}</li>' for text in one.references)
    return (
        f'<figure><div class="picture">{picture}</div><figcaption>{captions}<ul>{references}</ul>'
        f'<p class="note">{escape(one.image_id)}</p></figcaption></figure>\n'
    )


_STYLE = """
section { max-width: 1500px; margin: 0 auto; padding: 8px 24px } h2 { font-size: 19px; margin: 22px 0 10px }
.wide { overflow-x: auto } table { border-collapse: collapse; background: var(--card); font-size: 15px }
th, td { padding: 7px 12px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { color: var(--soft); font-weight: 600 } td { font-variant-numeric: tabular-nums; vertical-align: top }
.left2 :is(th, td):nth-child(-n+2) { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 8em }
td small { display: block; color: var(--soft); font-size: 12px } .best { font-weight: 700 }
.best small { font-weight: 400 }
.remarks { color: var(--soft); font-size: 14px; max-width: 60em; padding-left: 18px } p.remarks { padding: 0 }
img.plot { width: 100%; max-width: 1100px; height: auto; border-radius: 10px; background: #fff }
.model { margin-top: 8px; font-size: 13px; color: var(--soft); display: flex; justify-content: space-between; gap: 1em }
"""
