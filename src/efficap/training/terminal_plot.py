"""Curves for a terminal, in braille: each letter has two by four dots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich.text import Text

_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a letter, from U+2800 on


class Curve(NamedTuple):
    """Values by optimiser step, and rich's name of a colour."""

    values: pd.Series[float]
    colour: str


def plot(curves: Sequence[Curve], width: int, height: int, *, last_step: float) -> Text:
    """Curves over a common scale, whose least and largest value stand at the left.

    Args:
        curves: the later ones lie over the earlier; empty ones are left out, and values that are not finite.
        width, height: letters.
        last_step: at the right edge.
    """
    finite = [curve._replace(values=curve.values[np.isfinite(curve.values)]) for curve in curves]
    shown = [curve for curve in finite if len(curve.values)]
    if not shown:
        return Text("nothing yet", style="dim")
    low = min(float(curve.values.min()) for curve in shown)
    high = max(float(curve.values.max()) for curve in shown)
    labels = [f"{high:.3g}", *[""] * (height - 2), f"{low:.3g}"]
    margin = max(map(len, labels)) + 1
    columns = max(1, width - margin)
    letters, colours = np.zeros((height, columns), int), np.full((height, columns), "", object)
    for values, colour in shown:
        for x, y in _dots(values, (low, high), 2 * columns, 4 * height, last_step):
            letters[y // 4, x // 2] |= _DOTS[y % 4, x % 2]
            colours[y // 4, x // 2] = colour
    text = Text(no_wrap=True)
    for row in range(height):
        text.append(labels[row].rjust(margin - 1) + " ", style="dim")
        for letter, colour in zip(letters[row], colours[row], strict=True):
            text.append(chr(0x2800 + letter), style=colour)
        text.append("\n" if row < height - 1 else "")
    return text


def _dots(
    values: pd.Series[float], scale: tuple[float, float], width: int, height: int, last_step: float
) -> list[tuple[int, int]]:
    """The dots of a curve, (x, y) from the upper left, joined from each value to the next."""
    low, high = scale
    across = np.asarray(values.index, float) / max(last_step, 1e-9) * (width - 1)
    down = (high - values.to_numpy(float)) / max(high - low, 1e-9) * (height - 1)
    dots = []
    for start in range(len(across)):
        end = min(start + 1, len(across) - 1)
        steps = 1 + int(max(abs(across[end] - across[start]), abs(down[end] - down[start])))
        xs, ys = (np.linspace(line[start], line[end], steps) for line in (across, down))
        dots += list(zip(xs.round().astype(int).tolist(), ys.round().astype(int).tolist(), strict=True))
    return [(min(max(x, 0), width - 1), y) for x, y in dots]
