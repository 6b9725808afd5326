"""From the encoder's feature map to the memory that the decoder reads.

B images, C channels, h x w positions of the feature map, N = h * w, D the decoder's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficap.errors import InputError
from efficap.models.attention import attention
from efficap.models.linear import Linear, linear


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
        self.project = Linear(channels, width)
        self.positions = nn.Embedding(grid[0] * grid[1], width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BridgeBlock(width, n_heads, dropout) for _ in range(n_blocks))
        self.norm_out = nn.LayerNorm(width)
        self.apply(_init_weights)

    def forward(self, features: Tensor) -> Tensor:
        """Map a (B, C, h, w) feature map to the (B, N, D) memory."""
        x = self._embed(features)
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)

    def rollout(self, features: Tensor) -> Tensor:
        """How much of each position of the feature map is in each of the memory: (B, N, N), rows of sum 1."""
        return rolled_out(self.blocks, self._embed(features))

    def _embed(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        x = features.flatten(2).transpose(1, 2)  # (B, N, C)
        x = projected(x, self.norm_in, self.project)  # (B, N, D)
        return self.dropout(x + interpolated(self.positions.weight, self.grid, (height, width)))


def projected(x: Tensor, norm: nn.LayerNorm, project: Linear) -> Tensor:
    """`project(norm(x))`: (B, N, C) -> (B, N, D).

    To learn, the normalisation's scale and shift are multiplied into the projection's weight and bias. Their gradients
    then need none of the normalised `x`, which is half of the projection's backward work and, where the encoder is
    frozen, of no other use.
    """
    if not (torch.is_grad_enabled() and project.weight.requires_grad):
        return project(norm(x))
    weight = project.weight * norm.weight  # (D, C)
    bias = project.bias + (project.weight * norm.bias).sum(dim=1)  # (D,)
    return linear(F.layer_norm(x, norm.normalized_shape, eps=norm.eps), weight, bias)


def rolled_out(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Attention followed through blocks back to their input (Abnar and Zuidema, 2020, https://arxiv.org/abs/2005.00928).

    A block passes on half of what a position was, by its residual, and half by its attention, the mean over heads.

    Args:
        blocks: `BridgeBlock`s.
        x: (B, N, D), the input of the first.

    Returns:
        (B, N, N): in each row, of a position after the last block, the shares of the positions of `x`.
    """
    identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    shares = identity.expand(len(x), -1, -1)  # (B, N, N)
    for block in blocks:
        assert isinstance(block, BridgeBlock)
        shares = (block.weights(x).mean(dim=1) + identity) / 2 @ shares
        x = block(x)
    return shares


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
        self.qkv = Linear(width, 3 * width)
        self.attention_out = Linear(width, width)
        self.norm_2 = nn.LayerNorm(width, layer_norm_epsilon)
        self.mlp = nn.Sequential(Linear(width, 4 * width), nn.GELU(), Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self._attend(self.norm_1(x)))
        return x + self.dropout(self.mlp(self.norm_2(x)))

    def weights(self, x: Tensor) -> Tensor:
        """How much each position looks at each as the block reads `x`: (B, H, N, N), rows of sum 1."""
        q, k, _ = self._project(self.norm_1(x))
        return (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def _project(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, N, d)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x)
        x = attention(q, k, v)
        return self.attention_out(x.transpose(1, 2).flatten(2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
