"""Scaled dot-product attention, whose gradient a CPU gets from matrix products where training is in bfloat16.

torch's own gradient was seen to take 7 to 10 times as long there for captions of 20 to 30 tokens (docs/benchmarks.md).

B images or rows, H heads of width d, T queries, N keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 2**16  # T * N, up to which all weights of a head are held; longer ones gain little and take memory


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, (B, H, T, d) out of (B, H, T, d) and twice (B, H, N, d).

    Args:
        mask: (T, N) bool, what may be seen, or what torch takes in its place where there is no gradient.
        is_causal: whether query t sees keys 0 … t; then without a mask.
        dropout: share of the weights that are left out.
    """
    learns = torch.is_grad_enabled() and q.requires_grad
    is_slow = learns and q.dtype == torch.bfloat16 and q.device.type == "cpu"
    if not is_slow or q.shape[-2] * k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):  # a softmax in float32 would be two more passes over its input
        scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]))  # (B, H, T, N)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(dim=-1)
        return (F.dropout(weights, dropout) if dropout else weights) @ v
