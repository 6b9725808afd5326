"""Word vectors from the captions alone, for a decoder that starts from nothing.

V vocabulary, D width, n captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMOOTHING = 0.75  # exponent of a neighbour's frequency (Levy et al., 2015, https://aclanthology.org/Q15-1016)
STD = 0.02  # of the values, GPT-2's own
_MORE = 16  # directions that the search for the largest D looks at besides


def word_vectors(captions: Iterable[Sequence[int]], vocab_size: int, width: int) -> Tensor:
    """Vectors by which words are alike that stand between like neighbours: "red" and "blue", "runs" and "walks".

    The left singular vectors of how much more often than by chance a word has each other one before it, and after it
    (positive pointwise mutual information; Levy and Goldberg, 2014, https://papers.nips.cc/paper/5477), each
    direction with the square root of its singular value; turned by chance, and all of one length.

    Args:
        captions: ids, BOS and EOS among them.
        vocab_size: V.
        width: D.

    Returns:
        (V, D) float32, with a standard deviation of `STD`; rows of words without a neighbour are zero.
    """
    rows = [torch.tensor(caption) for caption in captions]
    if not rows:
        return torch.zeros(vocab_size, width)
    before, after = torch.cat([row[:-1] for row in rows]), torch.cat([row[1:] for row in rows])
    neighbours = [information(after, before, vocab_size), information(before, after, vocab_size)]
    table = torch.cat(neighbours, dim=1)  # (V, 2V), sparse
    rank = min(width, vocab_size)
    with torch.random.fork_rng(devices=[]):  # what is drawn here, one of several processes draws alone
        left, values, _ = torch.svd_lowrank(table, min(rank + _MORE, vocab_size), niter=2)
        turn = nn.init.orthogonal_(torch.empty(width, width))
    found = F.pad(left[:, :rank] * values[:rank].sqrt(), (0, width - rank))  # (V, D)
    known = torch.sparse.sum(table, dim=1).to_dense()[:, None] > 0
    return F.normalize(found @ turn, dim=1) * known * (STD * width**0.5)


def information(words: Tensor, neighbours: Tensor, vocab_size: int) -> Tensor:
    """Positive pointwise mutual information of (m,) words and their (m,) neighbours: (V, V), sparse, its norm 1."""
    pairs = torch.stack([words, neighbours])
    counts = torch.sparse_coo_tensor(
        pairs, torch.ones(len(words)), (vocab_size, vocab_size), check_invariants=False
    ).coalesce()
    (row, column), count = counts.indices(), counts.values()
    of_word = words.bincount(minlength=vocab_size).float()
    of_neighbour = neighbours.bincount(minlength=vocab_size).float() ** SMOOTHING
    expected = of_word[row] * of_neighbour[column] / of_neighbour.sum()
    more = (count / expected).log().clamp(min=0)
    scaled = more / more.norm().clamp(min=1e-12)
    return torch.sparse_coo_tensor(
        counts.indices(), scaled, counts.shape, is_coalesced=True, check_invariants=False
    )
