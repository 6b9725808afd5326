"""The loss of captions.

B images, K captions of each, T tokens, D width, V vocabulary, n valid targets of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def caption_loss(
    hidden: Tensor, head: Tensor, tokens: Tensor, lengths: Tensor, *, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each next token, the mean over the valid ones of the batch.

    Only valid positions reach the output layer: padding costs nothing there and cannot change the loss.

    Args:
        hidden: (B, K, T - 1, D), what the decoder made of all tokens but each caption's last.
        head: (V, D), the output layer's weight.
        tokens: (B, K, T) int64.
        lengths: (B, K) int64, valid tokens of each caption; 0 for a caption that is not there.
        label_smoothing: 0 … 1, share of the target spread over the vocabulary (Szegedy et al., 2016).

    Returns:
        The loss in nats a token (0 where the batch has no valid target), and n.
    """
    targets = tokens[..., 1:]  # (B, K, T - 1)
    positions = torch.arange(targets.shape[-1], device=targets.device)
    valid = positions < lengths[..., None] - 1  # (B, K, T - 1)
    index = valid.flatten().nonzero().squeeze(1)  # (n,)
    logits = F.linear(hidden.flatten(0, 2)[index], head)  # (n, V)
    total = F.cross_entropy(
        logits.float(), targets.flatten()[index], label_smoothing=label_smoothing, reduction="sum"
    )
    return total / max(1, len(index)), index.new_tensor(len(index))
