"""Squeeze and excitation whose gradient keeps to the layout of its pictures.

torch writes the gradient of a mean over positions out in its default layout, and adding it to one that has channels
last was seen to take a sixth of EfficientNet-B0's backward pass (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models._efficientnet_blocks import SqueezeExcite as TimmSqueezeExcite
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class SqueezeExcite(nn.Module):
    """timm's squeeze and excitation (Hu et al., 2018) with the layers of another."""

    def __init__(self, other: TimmSqueezeExcite) -> None:
        super().__init__()
        self.conv_reduce, self.act1 = other.conv_reduce, other.act1
        self.conv_expand, self.gate = other.conv_expand, other.gate

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        mean = _Mean.apply(x) if torch.is_grad_enabled() else x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        scale: Tensor = self.gate(self.conv_expand(self.act1(self.conv_reduce(mean))))
        return x * scale


def keep_layout(backbone: nn.Module) -> None:
    """Put a `SqueezeExcite` in the place of each of timm's; weights and their names stay."""
    for parent in list(backbone.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, TimmSqueezeExcite):
                setattr(parent, name, SqueezeExcite(layer))


class _Mean(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        n_images, channels, height, width = ctx.shape
        return (gradient / (height * width)).expand(n_images, channels, height, width)
