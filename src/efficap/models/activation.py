"""SiLU in place only where nothing is learned.

Its gradient needs its input, of which autograd makes a copy where the output takes its place: a thirtieth of
EfficientNet-B0's forward and backward pass (docs/benchmarks.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SiLU(nn.SiLU):
    """torch's, in place as it is told where there are no gradients, and never where there are."""

    def forward(self, x: Tensor) -> Tensor:
        """(…) -> (…)."""
        return F.silu(x, inplace=self.inplace and not torch.is_grad_enabled())


def copy_no_inputs(backbone: nn.Module) -> None:
    """Put a `SiLU` in the place of each of torch's."""
    for parent in list(backbone.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.SiLU):
                setattr(parent, name, SiLU(layer.inplace))
