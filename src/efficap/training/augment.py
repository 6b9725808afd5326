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


def choose_hidden(tokens: Tensor, share: float) -> Tensor:
    """(B, K) bool, a share of the captions of (B, K, T) tokens: the picture alone has to tell each of their words.

    Parallel prediction (Tschannen et al., 2023, https://arxiv.org/abs/2306.07915), by which an encoder learns more than
    from words that those before them give away; the mask stays causal.
    """
    return torch.rand(tokens.shape[:2], device=tokens.device) < share


def hide_words(tokens: Tensor, is_hidden: Tensor) -> Tensor:
    """(B, K, T) tokens in which (B, K) hidden captions are nothing but BOS."""
    return torch.where(is_hidden[..., None], tokens[..., :1], tokens)


def told_once(places: Tensor, is_hidden: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What a decoder has to read of captions of which those hidden are, for a picture, the same.

    Args:
        places: (n,) int64, of the flattened (B, K, T) captions.
        is_hidden: (B, K) bool.
        length: T.

    Returns:
        (m,) int64, ascending, the places that remain once a picture's hidden captions are all its first one, as long as
        the longest of them; and (n,) int64, which of these stands for each of `places`.
    """
    count = is_hidden.shape[1]
    first = is_hidden.int().argmax(dim=1, keepdim=True)  # (B, 1)
    rows = torch.where(is_hidden, first, torch.arange(count, device=places.device))  # (B, K)
    rows += count * torch.arange(len(rows), device=places.device)[:, None]
    moved = rows.flatten()[places // length] * length + places % length
    return torch.unique(moved, return_inverse=True)
