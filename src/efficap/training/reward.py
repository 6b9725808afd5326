"""The reward of self-critical training: CIDEr-D of captions in the model's own tokens, compared with each other's.

B images, n captions of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor

from efficap.evaluation.cider_d import CiderD
from efficap.tokenizer import CaptionTokenizer

_ENCODED_AT_ONCE = 10_000  # captions


def caption_reward(captions: Iterable[str], tokenizer: CaptionTokenizer, max_tokens: int) -> CiderD:
    """CIDEr-D in the tokenizer's ids, EOS counted, each caption a document of its frequencies.

    A caption, and not a picture's captions together: so it is the same for every kind of data.

    Args:
        captions: of the training split.
        max_tokens: longer ones are cut, as in training.
    """

    def documents() -> Iterator[list[list[int]]]:
        rest = iter(captions)
        while part := list(itertools.islice(rest, _ENCODED_AT_ONCE)):
            for ids in tokenizer.encode(part, max_tokens)[0]:
                yield [ids[1:]]

    return CiderD(documents())


def above_the_others(rewards: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(B, n) rewards less the mean reward of the same picture's other n - 1 samples."""
    n = rewards.shape[1]
    return (rewards - rewards.mean(axis=1, keepdims=True)) * (n / (n - 1))


def words_of(tokens: Tensor, lengths: Tensor) -> list[list[list[int]]]:
    """The ids of each caption of each picture, BOS left out; none for a caption that is not there."""
    return [
        [ids[1:length] for ids, length in zip(of_image, of_each, strict=True) if length]
        for of_image, of_each in zip(tokens.tolist(), lengths.tolist(), strict=True)
    ]
