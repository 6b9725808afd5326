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
    """(B, K) bool, a share of each picture's captions, (B, K, T): the picture alone has to tell each of their words.

    Parallel prediction (Tschannen et al., 2023, https://arxiv.org/abs/2306.07915), by which an encoder learns more than
    from words that those before them give away; the mask stays causal.
    """
    images, count = tokens.shape[:2]
    up_or_down = torch.rand(images, 1, device=tokens.device)  # so that the mean is the share
    hidden = (share * count + up_or_down).floor()  # (B, 1)
    return torch.rand(images, count, device=tokens.device).argsort(dim=1) < hidden


def hide_words(tokens: Tensor, is_hidden: Tensor) -> Tensor:
    """(B, K, T) tokens in which (B, K) hidden captions are nothing but BOS."""
    return torch.where(is_hidden[..., None], tokens[..., :1], tokens)


def read_once(
    read: Tensor, places: Tensor, targets: Tensor, is_hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What a decoder has to read where a picture's hidden captions, which are all the same, are one.

    Args:
        read: (B, K, T) int64, captions of which those hidden are nothing but BOS.
        places: (n,) int64, of the flattened `read`.
        targets: (n,) int64, the token after each of `places`.
        is_hidden: (B, K) bool.

    Returns:
        (B, k, T) int64, the hidden one of each picture and then those that are read; (m,) int64, ascending, the places
        of theirs that have a next token; and (m, K) int64, the tokens that come after each, -1 for none.
    """
    length = read.shape[2]
    any_hidden = is_hidden.any(dim=1, keepdim=True)  # (B, 1)
    row = torch.where(is_hidden, 0, any_hidden + (~is_hidden).cumsum(dim=1) - 1)  # (B, K), among the k
    fewer = read.new_zeros(len(read), int(row.max()) + 1, length)
    fewer.scatter_(1, row[..., None].expand_as(read), read)
    # Of captions that are not there, which may be hidden as well, nothing but padding was written.
    fewer[:, 0] = torch.where(any_hidden, read[:, 0, :1], fewer[:, 0])
    row += fewer.shape[1] * torch.arange(len(row), device=row.device)[:, None]
    moved = row.flatten()[places // length] * length + places % length
    moved, order = moved.sort()
    places, of, counts = moved.unique_consecutive(return_inverse=True, return_counts=True)
    nth = torch.arange(len(moved), device=moved.device) - (counts.cumsum(0) - counts)[of]
    several = targets.new_full((len(places), is_hidden.shape[1]), -1)
    several[of, nth] = targets[order]
    return fewer, places, several
