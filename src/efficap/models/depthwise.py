"""Depthwise convolutions whose gradients a CPU computes fast.

oneDNN's gradient of the weight is fast for kernels of 3 x 3 that are not dilated, in bfloat16 that of the input where
it can be had by a convolution forward; others were seen to take up to 100 times as long (docs/benchmarks.md). So
larger kernels are taken apart into such where that was seen to gain, and what is left is computed in float32.

B images, C channels, H x W pixels before and h x w after, kernels of k x k.
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

Sizes = tuple[int, int]


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
        dtype = self._learns_in(x)
        if self.bias is not None or dtype is None:
            return super().forward(x)
        settings = self.stride, self.padding, self.dilation, self.groups
        y: Tensor = _Depthwise.apply(x.to(dtype), self.weight, *settings)
        return y

    def _learns_in(self, x: Tensor) -> torch.dtype | None:
        """bfloat16 under its autocast, float32 without where that gains; None for what is left to torch."""
        if not torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        if torch.is_autocast_enabled("cpu"):
            return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None
        return torch.float32 if x.dtype == torch.float32 and self._is_slow_in_float32(x) else None

    def _is_slow_in_float32(self, x: Tensor) -> bool:
        if max(self.dilation) > 1:
            return True
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            return max(self.kernel_size) > 3
        # By AVX2 large kernels are slow on pictures smaller than they alone.
        return max(self.kernel_size) > max(3, *x.shape[2:])


def use_fast_gradients(backbone: nn.Module) -> None:
    """Put a `DepthwiseConv2d` in the place of each depthwise convolution; weights and their names stay."""
    for parent in list(backbone.modules()):
        for name, conv in parent.named_children():
            if isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels == conv.out_channels > 1:
                setattr(parent, name, DepthwiseConv2d(conv))


class _Depthwise(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        return F.conv2d(x, weight.to(x.dtype), None, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = _of_input(gradient, x, weight, *ctx.settings) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(gradient, x, weight, *ctx.settings) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None, None, None


def _of_input(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The (B, C, H, W) gradient of a convolution's input, in its dtype."""
    if max(stride) == 1:  # it is a convolution itself, with the kernel turned round
        reach = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
        if min(reach) >= 0:
            turned = weight.flip(2, 3).to(x.dtype)
            return F.conv2d(gradient, turned, None, 1, reach, dilation, groups)
    shaped = torch.empty_like(x, dtype=torch.float32)  # none of its values are read
    settings = (stride, padding, dilation, groups)
    return _gradients(gradient.float(), shaped, weight, *settings, wanted=0).to(x.dtype)


def _of_weight(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes, dilation: Sizes, groups: int
) -> Tensor:
    """The (C, 1, k, k) gradient of its weight, in float32."""
    height, width = weight.shape[2:]
    is_dilated = max(dilation) > 1
    if height != width or height % 2 == 0 or height == 1 or (is_dilated and max(stride) > 1):
        settings = (stride, padding, dilation, groups)
        return _gradients(gradient.float(), x.float(), weight, *settings, wanted=1)
    if is_dilated:
        gradient, x, padding = *_apart(gradient, x, padding, dilation), (0, 0)
    if height == 3:
        small = weight.to(x.dtype)
        return _gradients(gradient, x, small, stride, padding, (1, 1), groups, wanted=1).to(weight.dtype)
    return _by_parts(gradient, x, weight, stride, padding)


def _apart(gradient: Tensor, x: Tensor, padding: Sizes, dilation: Sizes) -> tuple[Tensor, Tensor]:
    """What a dilated convolution with stride 1 keeps apart, as pictures of their own of one that is not dilated.

    Args:
        gradient: (B, C, h, w); x: (B, C, H, W).

    Returns:
        (d * d * B, C, …) gradient and padded pictures, the places that have the same remainder by the dilation d.
    """

    def phases(images: Tensor, pad: Sizes) -> Tensor:
        sides = [size + 2 * p for size, p in zip(images.shape[2:], pad, strict=True)]
        (down, more_down), (right, more_right) = (
            (p, p + -side % d) for side, p, d in zip(sides, pad, dilation, strict=True)
        )
        images = F.pad(images, (right, more_right, down, more_down)).permute(0, 2, 3, 1)
        apart = images.unflatten(2, (-1, dilation[1])).unflatten(1, (-1, dilation[0]))  # (B, h, d, w, d, C)
        return apart.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)

    return phases(gradient, (0, 0)), phases(x, padding)


def _by_parts(gradient: Tensor, x: Tensor, weight: Tensor, stride: Sizes, padding: Sizes) -> Tensor:
    """The gradient of a kernel above 3 x 3 as several of 3 x 3, which share rows and columns.

    Each of them reads the same padded pictures, from a place that is some rows and columns further: there is one copy,
    with room after its end. What is read across the end of a row, or of a picture, meets a gradient of 0.
    """
    (n_images, channels, height, width), (pad_h, pad_w) = x.shape, padding
    tall, wide = height + 2 * pad_h, width + 2 * pad_w
    offsets = range(0, weight.shape[2] - 2, 2)
    size = n_images * tall * wide * channels
    room = x.new_zeros(size + offsets[-1] * (wide + 1) * channels)
    padded = room[:size].view(n_images, tall, wide, channels)
    padded[:, pad_h : pad_h + height, pad_w : pad_w + width] = x.permute(0, 2, 3, 1)
    strides = (tall * wide * channels, 1, wide * channels, channels)
    h, w = ((side - 3) // step + 1 for side, step in zip((tall, wide), stride, strict=True))
    gradient = F.pad(gradient, (0, w - gradient.shape[3], 0, h - gradient.shape[2]))  # (B, C, h, w)
    small = weight.new_zeros(channels, 1, 3, 3, dtype=x.dtype)
    settings = (stride, (0, 0), (1, 1), channels)
    of_weight = torch.empty_like(weight)
    for i in offsets:
        for j in offsets:
            part = room.as_strided((n_images, channels, tall, wide), strides, (i * wide + j) * channels)
            of_part = _gradients(gradient, part, small, *settings, wanted=1)
            of_weight[:, :, i : i + 3, j : j + 3] = of_part
    return of_weight


def _gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sizes,
    padding: Sizes,
    dilation: Sizes,
    groups: int,
    *,
    wanted: int,
) -> Tensor:
    """torch's gradient of a convolution's input, 0, or of its weight, 1."""
    mask = [wanted == 0, wanted == 1, False]
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, stride, padding, dilation, False, [0, 0], groups, mask
    )
    return found[wanted]
