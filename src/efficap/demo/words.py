"""The words of a caption, out of its tokens: how likely each was, and where the model looked as it wrote it.

T tokens, h, w: the grid of latent positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from efficap.tokenizer import CaptionTokenizer
from efficap.training.writer import WrittenCaption


@dataclass(frozen=True, slots=True)
class Word:
    """A word as it stands between spaces.

    Attributes:
        text: with what is attached to it, such as a full stop.
        probability: of its tokens together, each after those before it; 1 for a prefix.
        attention: (h, w) how much the model looked at each place, the mean over the word's tokens; None where that was
            not asked for.
    """

    text: str
    probability: float
    attention: Tensor | None


def words_of(
    caption: WrittenCaption, tokenizer: CaptionTokenizer, grid: tuple[int, int] | None
) -> list[Word]:
    """The caption's words, in order.

    Args:
        grid: (h, w) of its attention; None where it has none.
    """
    texts = caption.text.split()
    places = _places(caption, tokenizer, len(texts))
    words = []
    for text, own in zip(texts, places, strict=True):
        log_prob = sum(caption.token_log_probs[place] for place in own)
        look = None
        if caption.attention is not None and grid is not None and own:
            look = caption.attention[[place - 1 for place in own]].mean(dim=0).unflatten(0, grid)  # (h, w)
        words.append(Word(text, math.exp(log_prob), look))
    return words


def _places(caption: WrittenCaption, tokenizer: CaptionTokenizer, words: int) -> list[list[int]]:
    """For each word the places of its tokens in the caption; a space that is a token belongs to the word after it."""
    places: list[list[int]] = [[] for _ in range(words)]
    pending: list[int] = []
    before = ""
    for place in range(1, len(caption.tokens) - caption.ended):
        pending.append(place)
        upto = tokenizer.decode(caption.tokens[: place + 1])
        if upto != before and 0 < len(upto.split()) <= words:
            places[len(upto.split()) - 1] += pending
            pending, before = [], upto
    if places:
        places[-1] += pending  # a letter that was cut in its midst
    return places
