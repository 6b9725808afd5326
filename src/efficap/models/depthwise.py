"""Depthwise convolutions whose gradients a CPU computes in float32, where training is in bfloat16.

oneDNN's gradient of a depthwise convolution with a stride was seen to take 20 times as long in bfloat16 as in float32
(docs/benchmarks.md); forward, bfloat16 is the faster of the two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution with the settings and the weights of another, torch's or timm's."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            (0, 0) if isinstance(conv, Conv2dSame) else conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            bias=conv.bias is not None,
            device="meta",  # weights of its own would take random numbers
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.pads_like_tensorflow = isinstance(conv, Conv2dSame)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h', w')."""
        if self.pads_like_tensorflow:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        if self.bias is not None or not (_learns_in_bfloat16() and x.device.type == "cpu"):
            return super().forward(x)
        y: Tensor = _Depthwise.apply(x, self.weight, self.stride, self.padding, self.dilation, self.groups)
        return y


def use_float32_gradients(backbone: nn.Module) -> None:
    """Put a `DepthwiseConv2d` in the place of each depthwise convolution; weights and their names stay."""
    for parent in list(backbone.modules()):
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1:
                setattr(parent, name, DepthwiseConv2d(conv))


def _learns_in_bfloat16() -> bool:
    return (
        torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class _Depthwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        x = x.to(torch.bfloat16)
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return F.conv2d(x, weight.to(torch.bfloat16), None, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        wanted = [*ctx.needs_input_grad[:2], False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient.float(),
            x.float(),
            weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            wanted,
        )
        return None if of_x is None else of_x.to(x.dtype), of_weight, None, None, None, None
