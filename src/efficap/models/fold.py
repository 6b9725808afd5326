"""BatchNorm within the convolution before it, for inference.

In evaluation it is a scale and a shift of each channel, which the convolution's weight and bias can hold (Jacob et al.,
2018, https://arxiv.org/abs/1712.05877, section 3.2): a pass less over each map.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def fold_norms(backbone: nn.Module) -> None:
    """Let each BatchNorm that stands behind a convolution go into it, in place; what else there is stays.

    Args:
        backbone: in which a BatchNorm behind a convolution reads what this makes, and nobody else does, as in timm's
            EfficientNets; from now on for inference alone.
    """
    for parent in list(backbone.modules()):
        for (_, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                _fold(conv, norm)
                setattr(
                    parent, name, getattr(norm, "act", nn.Identity())
                )  # timm's BatchNorms have one in them


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    dtype = conv.weight.dtype
    exact = torch.promote_types(dtype, torch.float32)
    scale = norm.weight.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()  # (C,)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    bias = norm.bias - mean * scale
    conv.weight = nn.Parameter((conv.weight * scale[:, None, None, None]).to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
