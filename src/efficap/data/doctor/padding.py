"""Bars of one colour that a resizer put beside a picture, or above and below it.

H, W: height and width in pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST = 0.04  # of the side, each of the two bars
TOLERANCE = 12  # grey levels: JPEG leaves no bar quite even
EDGE = 0.5  # of the first line behind a bar must differ from it

# A photograph's own sky or studio wall also ends in even lines. A bar is told from it by its counterpart of the same
# colour on the other side, and by ending all along a straight line.


def bars(pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """Per cent of the height that bars above and below take, and of the width that those at the sides take.

    Args:
        pixels: (H, W, 3) RGB.

    Returns:
        0 where there are no two bars of the same colour, each at least `LEAST` of the side.
    """
    return _share(pixels), _share(pixels.transpose(1, 0, 2))


def _share(lines: NDArray[np.uint8]) -> int:
    """(H, W, 3): per cent of the H lines that lie in bars at both ends."""
    if len(lines) < 3:
        return 0
    colour = np.median(lines[0], axis=0).astype(np.int16)  # (3,)
    first = _even(lines, colour)
    if first < max(2, LEAST * len(lines)) or first == len(lines):
        return 0
    last = _even(lines[::-1], colour)
    if last < max(2, LEAST * len(lines)) or first + last > len(lines) - 3:
        return 0
    # Resizing blends the line at the edge with the bar.
    sharp = all(_differs(lines[number], colour).mean() >= EDGE for number in (first + 1, -last - 2))
    return round(100 * (first + last) / len(lines)) if sharp else 0


def _even(lines: NDArray[np.uint8], colour: NDArray[np.int16]) -> int:
    """How many lines from the first on are of one colour, all but 1 % of each."""
    for number, line in enumerate(lines):
        if _differs(line, colour).mean() > 0.01:
            return number
    return len(lines)


def _differs(line: NDArray[np.uint8], colour: NDArray[np.int16]) -> NDArray[np.bool_]:
    return np.asarray((np.abs(line - colour) > TOLERANCE).any(axis=-1))  # (W,)
