"""What training changes in a batch on the model's device: pictures start small, words are not to be relied on or seen.

B images, K captions of each, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROWN_AT = (
    0.75  # of the training; the rest is at full size, which BatchNorm's statistics have to be taken from
)
STEP = 32  # pixels, the stride of the last feature map


def growing_size(start: int, full: int, progress: float) -> int:
    """The side of pictures that grow from `start` to `full` pixels, in steps of 32.

    Progressive learning (Tan and Le, 2021, https://arxiv.org/abs/2104.00298): early steps at a small size cost a
    fraction, and what is learned first shows at that size too.

    Args:
        progress: the share of the training that is over, 0 … 1.
    """
    steps = (full - start) // STEP + 1
    return full if progress >= GROWN_AT else start + STEP * int(progress / GROWN_AT * steps)


def resized(images: Tensor, size: int) -> Tensor:
    """(B, 3, S, S) uint8 pictures at another, smaller size."""
    if images.shape[-1] == size:
        return images
    small = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return small.round_().clamp_(0, 255).to(torch.uint8)


def drop_tokens(tokens: Tensor, share: float, vocab_size: int) -> Tensor:
    """(B, K, T) tokens of which a share, BOS excepted, is replaced by random ones.

    Word dropout (Bowman et al., 2016, https://arxiv.org/abs/1511.06349): a decoder that cannot rely on the words before
    has to look at the picture.
    """
    dropped = torch.rand(tokens.shape, device=tokens.device) < share
    dropped[..., 0] = False
    return torch.where(dropped, torch.randint_like(tokens, vocab_size), tokens)


def hide_words(tokens: Tensor, share: float) -> Tensor:
    """(B, K, T) tokens in which a share of the captions is nothing but BOS: the picture alone has to tell each word.

    Parallel prediction (Tschannen et al., 2023, https://arxiv.org/abs/2306.07915), by which an encoder learns more than
    from words that those before them give away; the mask stays causal.
    """
    hidden = torch.rand(tokens.shape[:2], device=tokens.device) < share  # (B, K)
    return torch.where(hidden[..., None], tokens[..., :1], tokens)
