"""Histograms whose bars the page's script turns into filters, and the learning curves of the run."""

from __future__ import annotations

import base64
import itertools
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from efficap.errors import InputError
from efficap.evaluation.curves import curves_png

MOST_BINS = 40
LABELS = 8  # below the bars, at most
TAIL = 0.005  # of the references: longer ones share the last bin


def curves(metrics_csv: Path | None) -> str:
    """The section of learning curves; nothing where there is no table of them, or nothing in it to draw."""
    try:
        png = curves_png(metrics_csv) if metrics_csv and metrics_csv.is_file() else b""
    except InputError:  # a damaged table: the evaluation is not to end for that
        png = b""
    if not png:
        return ""
    source = base64.b64encode(png).decode()
    alt = "losses and validation scores over the optimiser steps"
    return (
        f'<section><h2>Training</h2><div class="scroll"><img class="curves" alt="{alt}" '
        f'src="data:image/png;base64,{source}"></div></section>\n'
    )


def histogram(
    heading: str, field: str, values: Sequence[int], *, beside: Sequence[int] = (), decimals: int = 0
) -> str:
    """Bars of the shares of `values`, and a line of those of `beside`; nothing where there are no values.

    Args:
        heading: what is counted, with its unit.
        field: of the page's form, that a click on a bar fills.
        values: of the captions, whole; where `decimals` is 2, in hundredths.
        beside: the same of the references.
        decimals: of the numbers on the axis.
    """
    if not values:
        return ""
    low, longest = min([*values, *beside]), max([*values, *beside])
    high = max(max(values), sorted(beside)[int((1 - TAIL) * (len(beside) - 1))] if beside else low)
    width = next(width for width in _widths() if high // width - low // width < MOST_BINS)
    bins = range(low // width * width, high + 1, width)
    shares = _shares(values, bins)
    others = _shares(beside, bins) if beside else []
    top = max([*shares, *others])

    def shown(value: int) -> str:
        return f"{value / 10**decimals:.{decimals}f}"

    bars = []
    for number, start in enumerate(bins):
        end = None if number == len(bins) - 1 and longest >= start + width else start + width - 1
        span = (
            shown(start)
            if end == start
            else f"{shown(start)} or more"
            if end is None
            else f"{shown(start)} to {shown(end)}"
        )
        said = f"{span}: {100 * shares[number]:.1f} %" + (
            f" (references {100 * others[number]:.1f} %)" if others else ""
        )
        height = 100 * shares[number] / top
        bars.append(
            f'<g data-field="{field}" data-from="{shown(start)}" data-to="{"" if end is None else shown(end)}">'
            f'<title>{said}</title><rect class="reach" x="{number}" width="1" height="100"/>'
            f'<rect class="bar" x="{number + 0.08:g}" y="{100 - height:.2f}" width=".84" height="{height:.2f}"/></g>'
        )
    every = -(-len(bins) // LABELS)
    ticks = "".join(f"<span>{shown(start) if n % every == 0 else ''}</span>" for n, start in enumerate(bins))
    return (
        f'<figure class="histogram"><h3>{escape(heading)}</h3><p>{_summary(values, beside, decimals)}</p>'
        f'<div class="plot"><small>{100 * top:.0f} %</small>'
        f'<svg viewBox="0 0 {len(bins)} 100" preserveAspectRatio="none" role="img" aria-label="{escape(heading)}">'
        f'{_outline(others, top)}{"".join(bars)}</svg><div class="ticks">{ticks}</div></div></figure>'
    )


def _summary(values: Sequence[int], beside: Sequence[int], decimals: int) -> str:
    scale = 10**decimals
    text = f"mean {statistics.fmean(values) / scale:.2f}, median {statistics.median(values) / scale:g}"
    if beside:
        text += f'; <span class="line">references</span> {statistics.fmean(beside):.2f}'
    return text


def _shares(values: Sequence[int], bins: range) -> list[float]:
    """How much of the values lies in each bin; the last takes all beyond."""
    counts = [0] * len(bins)
    for value in values:
        counts[min((value - bins.start) // bins.step, len(bins) - 1)] += 1
    return [count / len(values) for count in counts]


def _outline(shares: Sequence[float], top: float) -> str:
    if not shares:
        return ""
    points = [
        f"{x},{100 - 100 * share / top:.2f}"
        for number, share in enumerate(shares)
        for x in (number, number + 1)
    ]
    return f'<polyline class="outline" points="0,100 {" ".join(points)} {len(shares)},100"/>'


def _widths() -> itertools.chain[int]:
    """1, 2, 5, 10, 20, 50, …"""
    return itertools.chain.from_iterable(
        (n, 2 * n, 5 * n) for n in (10**power for power in itertools.count())
    )
