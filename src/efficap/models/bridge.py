"""From the encoder's feature map to the memory that the decoder reads.

B images, C channels, h x w positions of the feature map, N = h * w, D the decoder's width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from efficap.errors import InputError


class Bridge(nn.Module):
    """Flatten, normalise, project, add learned positions, then bidirectional transformer blocks.

    The positions are absolute and learned; relative ones are left to the convolutions before. They are
    interpolated where the feature map is of another size than the one they were made for.

    Args:
        channels: C, of the feature map.
        grid: (h, w) of the feature map that the positions are made for.
        width: D.
        n_blocks: transformer blocks, 0 or more.
        n_heads: attention heads of each; divides `width`.
        dropout: on the positions' sum and on both residual branches.

    Raises:
        InputError: `n_heads` does not divide `width`, and there are blocks.
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
        self.grid = grid
        self.norm_in = nn.LayerNorm(channels)
        self.project = nn.Linear(channels, width)
        self.positions = nn.Embedding(grid[0] * grid[1], width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BridgeBlock(width, n_heads, dropout) for _ in range(n_blocks))
        self.norm_out = nn.LayerNorm(width)
        self.apply(_init_weights)

    def forward(self, features: Tensor) -> Tensor:
        """Map a (B, C, h, w) feature map to the (B, N, D) memory."""
        height, width = features.shape[-2:]
        x = features.flatten(2).transpose(1, 2)  # (B, N, C)
        x = self.project(self.norm_in(x))  # (B, N, D)
        x = self.dropout(x + interpolated(self.positions.weight, self.grid, (height, width)))
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


def interpolated(positions: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The (N, D) learned positions of a grid, row after row, as those of a grid of another (h, w)."""
    if size == grid:
        return positions
    table = positions.unflatten(0, grid).permute(2, 0, 1)[None]  # (1, D, h, w)
    table = F.interpolate(table.float(), size=size, mode="bicubic", align_corners=False)
    return table[0].flatten(1).T.to(positions.dtype)


class BridgeBlock(nn.Module):
    """A pre-norm transformer encoder block without a mask: every position sees every other."""

    def __init__(self, width: int, n_heads: int, dropout: float, layer_norm_epsilon: float = 1e-5) -> None:
        super().__init__()
        if n_heads < 1 or width % n_heads:
            raise InputError(
                f"model.bridge.n_heads={n_heads} must divide the decoder's width, model.decoder.n_embd={width}"
            )
        self.n_heads = n_heads
        self.norm_1 = nn.LayerNorm(width, layer_norm_epsilon)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, layer_norm_epsilon)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self._attend(self.norm_1(x)))
        return x + self.dropout(self.mlp(self.norm_2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        x = F.scaled_dot_product_attention(q, k, v)
        return self.attention_out(x.transpose(1, 2).flatten(2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
