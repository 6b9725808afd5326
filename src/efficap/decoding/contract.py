"""What every decoding method shares: the step function it calls, the result it returns, the limits it keeps.

B images, R rows (R = B * beams, image-major), n returned captions per image, T tokens, V words.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from efficap.errors import InputError


class Step(Protocol):
    """One step of a language model; it keeps its own cache.

    Args:
        ids: (R,) int64, the newest token of each row.
        parents: (R,) int64: row r continues the sequence that was row ``parents[r]`` of the previous call;
            None: row r continues row r. Always None at the first call, where R = B and all ids are BOS.

    Returns:
        (R, V) float, logits of the next token.
    """

    def __call__(self, ids: Tensor, parents: Tensor | None, /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """The captions of a batch, the best first.

    Attributes:
        tokens: (B, n, T) int64, each caption ``BOS w1 … wn EOS`` and then EOS as padding; a caption that
            reached ``max_tokens`` may end without EOS.
        lengths: (B, n) int64, valid tokens with BOS and, where there is one, EOS.
        scores: (B, n) float32, as the method defines them, in nats.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 3
        assert self.tokens.shape[:2] == self.lengths.shape == self.scores.shape


@dataclass(frozen=True, kw_only=True)
class Decoding(ABC):
    """A decoding method with its settings, checked when it is built.

    Attributes:
        max_tokens: the longest caption, BOS and EOS counted; one that gets there is cut.
        min_tokens: EOS is forbidden while a caption has fewer tokens than this, BOS counted (what
            transformers calls ``min_length``): 2 asks for at least one word, 0 for nothing.

    Raises:
        InputError: an option is out of its range.
    """

    method: ClassVar[str]
    max_tokens: int
    min_tokens: int

    def __post_init__(self) -> None:
        require(
            is_whole(self.max_tokens) and self.max_tokens >= 2,
            "max_tokens",
            self.max_tokens,
            "must be a whole number of at least 2; BOS and EOS are counted, so add 2 to the words you want",
        )
        require(
            is_whole(self.min_tokens) and 0 <= self.min_tokens < self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"must be a whole number of at least 0 and below decoding.max_tokens={self.max_tokens}; "
            "lower it or raise max_tokens",
        )

    @torch.no_grad()
    def decode(
        self, step: Step, image_ids: Sequence[str], *, bos_id: int, eos_id: int, device: torch.device | str
    ) -> Decoded:
        """Captions of a batch, one for each image: n = 1.

        All images stay in the batch until the last one is done. `bos_id` may equal `eos_id`: the first token
        never counts as an end.

        Args:
            step: the model's step function, with a fresh cache for these images.
            image_ids: B keys, in the order of the step's rows; sampling draws by them.
            bos_id, eos_id: token ids.
            device: where `step` expects its ids.

        Raises:
            InputError: the step's logits are not finite.
        """
        assert image_ids, "an empty batch"
        decoded = self._search(step, image_ids, bos_id, eos_id, torch.device(device))
        broken = (~decoded.scores[:, 0].isfinite()).nonzero().flatten().tolist()
        if broken:
            raise InputError(
                f"the model's logits are NaN or infinite for {len(broken)} of {len(image_ids)} images, the "
                f"first is {image_ids[broken[0]]}; its weights have diverged: use another checkpoint, or "
                "train with a lower learning rate"
            )
        return decoded

    @abstractmethod
    def _search(
        self, step: Step, image_ids: Sequence[str], bos_id: int, eos_id: int, device: torch.device
    ) -> Decoded: ...

    def _log_probs(self, logits: Tensor, length: int, eos_id: int) -> Tensor:
        """float32 log-probabilities (R, V) of the word after `length` tokens, BOS counted."""
        log_probs = logits.float().log_softmax(dim=-1)
        if length < self.min_tokens:
            log_probs[:, eos_id] = -math.inf
        return log_probs


def require(condition: bool, option: str, value: object, rule: str) -> None:
    """Raises InputError ``decoding.<option>=<value> <rule>`` unless `condition` holds."""
    if not condition:
        raise InputError(f"decoding.{option}={value} {rule}")


def is_whole(value: object) -> bool:
    """Whether `value` is an int (a bool is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
