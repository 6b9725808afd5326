"""Scaled dot-product attention; a CPU gets it from matrix products where torch's own was seen to be slower.

That is the gradient in bfloat16, 7 to 10 times for captions of 20 to 30 tokens, and a step of decoding, whose few
queries took 1.5 to 5 times as long in bfloat16 and about twice in float32 (docs/benchmarks.md).

B images or rows, H heads of width d, T queries, N keys.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHORT = 2**16  # T * N, up to which all weights of a head are held; longer ones gain little and take memory
FEW = 16  # queries of a head, up to which products are faster without a gradient: those of a picture's rows in a step


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
    if not _is_slow(q) or q.shape[-2] * k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):  # a softmax in float32 would be two more passes over its input
        scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(q.shape[-1]))  # (B, H, T, N)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(dim=-1)
        return (F.dropout(weights, dropout) if dropout else weights) @ v


def _is_slow(q: Tensor) -> bool:
    """Whether torch's own attention is slower for these queries than matrix products."""
    if q.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and q.requires_grad:
        return q.dtype == torch.bfloat16
    return not torch.compiler.is_compiling() and q.shape[-2] <= FEW
