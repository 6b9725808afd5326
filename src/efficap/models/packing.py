"""Captions without their padding: in training every linear layer sees valid tokens only, one after the other.

R rows, T tokens at most, n valid tokens of all rows together, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Packing:
    """Where the valid tokens of padded rows lie. Attention takes rows, all else takes tokens.

    With captions of one picture between 8 and 30 tokens long, about half of the padded places are padding.

    Args:
        places: (n,) int64, ascending, the valid places of the flattened (R, T).
        rows: R.
        length: T.
    """

    def __init__(self, places: Tensor, rows: int, length: int) -> None:
        self.places, self.rows, self.length = places, rows, length

    @property
    def positions(self) -> Tensor:
        """(n,) int64, the place of each token in its row."""
        return self.places % self.length

    def pack(self, x: Tensor) -> Tensor:
        """The valid ones of (R, T, …), or of any other split of these R * T places in two: (n, …)."""
        packed: Tensor = _Pack.apply(x.flatten(0, 1), self.places)
        return packed

    def unpack(self, x: Tensor) -> Tensor:
        """(n, C) as rows, (R, T, C), with zeros for padding."""
        padded: Tensor = _Unpack.apply(x, self.places, self.rows * self.length)
        return padded.view(self.rows, self.length, -1)


# Gradients are looked up, not added up as autograd would: it cannot know that no two tokens share a place.
class _Pack(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = len(x)
        return x.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _scatter(gradient, places, ctx.size), None


class _Unpack(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return _scatter(x, places, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


def _scatter(x: Tensor, places: Tensor, size: int) -> Tensor:
    return torch.zeros(size, *x.shape[1:], dtype=x.dtype, device=x.device).index_copy_(0, places, x)
