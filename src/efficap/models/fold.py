"""BatchNorm within the convolution before it, for inference.

In evaluation it is a scale and a shift of each channel, which the convolution's weight and bias can hold (Jacob et al.,
2018, https://arxiv.org/abs/1712.05877, section 3.2): a pass less over each map.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights


def fold_norms(backbone: nn.Module) -> None:
    """Let each BatchNorm that stands behind a convolution go into it, in place; what else there is stays.

    Args:
        backbone: in which a BatchNorm behind a convolution reads what this makes, and nobody else does, as in timm's
            EfficientNets; from now on for inference alone.
    """
    for parent in list(backbone.modules()):
        for (_, conv), (name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                statistics = norm.running_mean, norm.running_var, norm.eps
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, *statistics, norm.weight, norm.bias
                )
                # timm's BatchNorms have the activation in them
                setattr(parent, name, getattr(norm, "act", nn.Identity()))
