"""The largest of many, without sorting them.

R rows, V words, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS = 512


def top_words(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row of (R, V), the largest first, and where they are.

    The row is folded into columns, of which only the `count` with the largest maxima can hold any of the largest: one
    pass for the maxima, and a selection among a few hundred. Where several are equal, any of them may be chosen.

    Returns:
        (R, count) values and int64 indices; fewer where V is smaller.
    """
    rows, words = values.shape
    depth = words // COLUMNS
    if depth < 2 or count > COLUMNS // 4:
        return values.topk(min(count, words))
    folded = values[:, : depth * COLUMNS].view(rows, depth, COLUMNS)
    columns = folded.amax(dim=1).topk(count).indices  # (R, count)
    chosen = folded.gather(2, columns[:, None].expand(-1, depth, -1)).flatten(1)  # (R, depth * count)
    rest = values[:, depth * COLUMNS :]  # (R, V mod C)
    best, place = torch.cat((chosen, rest), dim=1).topk(count)  # (R, count)
    down, which = place // count, place % count
    index = down * COLUMNS + columns.gather(1, which)
    in_rest = place >= depth * count
    return best, torch.where(in_rest, place - depth * count + depth * COLUMNS, index)
