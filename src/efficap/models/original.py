"""The arithmetic of the original TensorFlow project where it differs, so that its models go on as they were trained.

B images, C channels, h x w positions of the feature map, N = h * w, D the decoder's width.

In the decoder: normalisation with an epsilon of 1e-10, the exact GELU, and an empty place before the first token that
every token sees; `GPT2` takes these three as arguments. What else differs is a matter of its weights: see
`efficap.models.pretrained.original`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficap.errors import InputError
from efficap.models.bridge import BridgeBlock, interpolated, rolled_out
from efficap.models.linear import Linear

_LAYER_NORM_EPSILON = 1e-10
_GROUPS = 32
DECODER: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "original": {"layer_norm_epsilon": _LAYER_NORM_EPSILON, "activation": "gelu", "empty_slot": True},
    "original_no_past": {
        "layer_norm_epsilon": _LAYER_NORM_EPSILON,
        "activation": "gelu",
        "empty_slot": False,
    },
}


class OriginalBridge(nn.Module):
    """Two constant rows around the flattened map, a group normalisation over all rows, projection, positions, blocks.

    Takes the arguments of `efficap.models.bridge.Bridge`; the number of channels must be a multiple of 32.
    """

    def __init__(
        self,
        *,
        channels: int,
        grid: tuple[int, int],
        width: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        if channels % _GROUPS:
            raise InputError(
                f"model.arithmetic=original needs a multiple of {_GROUPS} channels from the encoder, not {channels}"
            )
        self.grid = grid
        self.norm_in = nn.GroupNorm(_GROUPS, channels, eps=1e-3)
        self.project = Linear(channels, width)
        self.positions = nn.Embedding(grid[0] * grid[1] + 2, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            BridgeBlock(width, n_heads, dropout, _LAYER_NORM_EPSILON) for _ in range(n_blocks)
        )

    def forward(self, features: Tensor) -> Tensor:
        """Map a (B, C, h, w) feature map to the (B, N, D) memory."""
        x = self._embed(features)
        for block in self.blocks:
            x = block(x)
        return x[:, 1:-1]  # (B, N, D)

    def rollout(self, features: Tensor) -> Tensor:
        """How much of each position of the feature map is in each of the memory: (B, N, N), rows of sum 1.

        The shares of the two constant rows are left out.
        """
        shares = rolled_out(self.blocks, self._embed(features))[:, 1:-1, 1:-1]
        return shares / shares.sum(dim=-1, keepdim=True)

    def _embed(self, features: Tensor) -> Tensor:
        channels, height, width = features.shape[1:]
        x = F.pad(features.flatten(2), (1, 1), value=1 / channels)  # (B, C, N + 2)
        x = self.project(self.norm_in(x).transpose(1, 2))  # (B, N + 2, D)
        return self.dropout(x + self._positions_for((height, width)))

    def _positions_for(self, size: tuple[int, int]) -> Tensor:
        first, inner, last = self.positions.weight.split([1, self.grid[0] * self.grid[1], 1])
        return torch.cat([first, interpolated(inner, self.grid, size), last])  # (N + 2, D)
