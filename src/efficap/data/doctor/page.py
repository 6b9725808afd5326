"""A diagnosis as a page that needs nothing but itself, with the pictures in question."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from efficap.data.doctor.comparison import Exhibit
from efficap.data.doctor.diagnosis import Diagnosis
from efficap.data.doctor.examination import Examination
from efficap.data.doctor.findings import Finding, printable
from efficap.data.doctor.histograms import Histogram
from efficap.data.doctor.report import NAMED, summary
from efficap.data.pictures import PictureError

THUMBNAIL = 170  # pixels, the longer side
JPEG_QUALITY = 80
PARTS = 50  # splits or shards with a row of their own


def as_page(diagnosis: Diagnosis, seen: Examination, exhibits: list[Exhibit]) -> str:
    """The page as HTML: no script, no other file, nothing from the network."""
    title = f"Data doctor: {diagnosis.source}"
    findings = "".join(_finding(finding) for finding in diagnosis.findings)
    facts = "".join(f"<li>{escape(line)}</li>" for line in [*summary(diagnosis), *diagnosis.notes])
    counts = f"{diagnosis.pictures:,} pictures, {diagnosis.captions:,} captions, {diagnosis.bad:,} unusable"
    sections = [
        f"<header><h1>{escape(title)}</h1><p>{counts}</p></header>",
        f"<section><h2>Findings</h2>{findings or '<p>Nothing is wrong.</p>'}</section>",
        *(_exhibit(exhibit, seen) for exhibit in exhibits),
        f'<section><h2>What is there</h2><div class="columns">{_parts(diagnosis)}<ul>{facts}</ul></div></section>',
        '<section class="columns">' + "".join(_chart(entry) for entry in diagnosis.histograms) + "</section>",
    ]
    return _HEAD.replace("@TITLE@", escape(title)) + "\n".join(sections) + "\n</body>\n</html>\n"


def _finding(finding: Finding) -> str:
    names = "".join(f"<li>{escape(name)}</li>" for name in finding.names[:NAMED])
    more = "<li>… more in report.json</li>" if len(finding.names) > NAMED else ""
    return (
        f"<details{' open' if len(finding.names) <= 3 else ''}>"
        f"<summary>{escape(finding.title)}: <b>{finding.count:,}</b>"
        f"<small>{escape(finding.advice)}</small></summary><ul>{names}{more}</ul></details>\n"
    )


def _exhibit(exhibit: Exhibit, seen: Examination) -> str:
    groups = "".join(
        f'<div class="group">{"".join(_figure(number, seen) for number in group)}</div>'
        for group in exhibit.groups
    )
    return f'<section><h2>{escape(exhibit.title)}</h2><div class="groups">{groups}</div></section>\n'


def _figure(number: int, seen: Examination) -> str:
    name = printable(seen.name(number))
    split = f" ({seen.parts[seen.part_of[number]].name})" if seen.kind == "table" else ""
    try:
        image = Image.fromarray(seen.picture(number).pixels(at_least=THUMBNAIL).permute(1, 2, 0).numpy())
    except PictureError as error:
        picture = f"<p>{escape(str(error))}</p>"
    else:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        data = io.BytesIO()
        image.save(data, "JPEG", quality=JPEG_QUALITY)
        source = base64.b64encode(data.getvalue()).decode()
        picture = f'<img alt="" width="{image.width}" height="{image.height}" src="data:image/jpeg;base64,{source}">'
    caption = f'<small dir="auto">{escape(printable(seen.caption(number)))}</small>'
    return f"<figure>{picture}<figcaption>{escape(name + split)}{caption}</figcaption></figure>"


def _parts(diagnosis: Diagnosis) -> str:
    rows = "".join(
        f"<tr><td>{escape(part.name)}</td><td>{part.pictures:,}</td><td>{part.captions:,}</td><td>{part.bad:,}</td></tr>"
        for part in diagnosis.parts[:PARTS]
    )
    if len(diagnosis.parts) > PARTS:
        rows += f'<tr><td colspan="4">… {len(diagnosis.parts) - PARTS:,} more in report.json</td></tr>'
    first = "split" if diagnosis.kind == "table" else "shard"
    return (
        f"<table><thead><tr><th>{first}</th><th>pictures</th><th>captions</th><th>unusable</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _chart(entry: Histogram) -> str:
    """An SVG of 240 x 118 units; the marks below are the lower edges of their bins."""
    highest, step = max(entry.counts), 240 / max(6, len(entry.counts))
    bars = "".join(
        f'<rect x="{step * number + 0.5:.2f}" y="{100 - 100 * count / highest:.2f}" width="{step - 1:.2f}" '
        f'height="{100 * count / highest:.2f}"><title>{low:,g} to {high:,g}: {count:,}</title></rect>'
        for number, (low, high, count) in enumerate(
            zip(entry.edges, entry.edges[1:], entry.counts, strict=False)
        )
    )
    marks = "".join(
        f'<text x="{step * (number + 0.5):.2f}" y="110">{entry.edges[number]:,g}</text>'
        for number in range(0, len(entry.counts), -(-len(entry.counts) // 8))
    )
    return (
        f'<figure class="chart"><figcaption>{escape(entry.title)}<small>highest bar {highest:,}</small></figcaption>'
        f'<svg viewBox="-8 -2 256 118" role="img">{bars}{marks}</svg></figure>\n'
    )


# The policy lets the page load nothing but the pictures inside it.
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
  --page: #f4f5f6; --card: #fff; --ink: #1a1c1e; --soft: #676d73; --line: #dfe2e5; --bar: #4878a8; --bad: #b3261e
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131517; --card: #1d2023; --ink: #e8eaec; --soft: #9aa1a8; --line: #303438; --bar: #6fa0d0; --bad: #f2867e
  }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.45 system-ui, sans-serif }
header, section { max-width: 1200px; margin: 0 auto; padding: 20px 24px 0; overflow-wrap: anywhere }
section:last-of-type { padding-bottom: 40px }
h1 { margin: 0; font-size: 24px } h2 { margin: 0 0 10px; font-size: 18px }
header p { margin: 4px 0 0; color: var(--soft) }
small { display: block; color: var(--soft); font-size: 13px }
details, .group, .chart, table { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
details { margin-bottom: 8px; padding: 8px 14px } summary { cursor: pointer } summary b { color: var(--bad) }
ul { margin: 6px 0; padding-left: 20px; color: var(--soft) }
.columns, .groups { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start }
.group { display: flex; flex-wrap: wrap; gap: 10px; padding: 10px }
figure { margin: 0 } .group figure { width: 170px } figcaption { font-size: 14px }
img { display: block; max-width: 100% }
.chart { flex: 1 1 320px; padding: 12px } svg { width: 100%; height: auto } rect { fill: var(--bar) }
svg text { fill: var(--soft); font-size: 7px; text-anchor: middle }
table { border-collapse: collapse } td, th { padding: 4px 12px; text-align: right } th { font-weight: 600 }
td:first-child, th:first-child { text-align: left }
</style>
</head>
<body>
"""
