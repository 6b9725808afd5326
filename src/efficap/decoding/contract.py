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

from efficap.decoding.rules import Rules
from efficap.errors import InputError


class Step(Protocol):
    """One step of a language model; it keeps its own cache.

    Args:
        ids: (R,) int64, the newest token of each row.
        parents: (R,) int64: row r continues the sequence that was row ``parents[r]`` of the previous call;
            None: row r continues row r. Always None at the first call, where R = B and all ids are BOS.
        images: (B',) int64: the places, among those of the previous call, of the images that go on; all rows are
            theirs. None: all images go on.

    Returns:
        (R, V) float, logits of the next token.
    """

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None, /) -> Tensor: ...


class Vocabulary(Protocol):
    """How words are spelled in ids."""

    def encode_prefix(self, text: str) -> list[int]:
        """The ids of the beginning of a caption, BOS left out."""
        ...

    def spellings(self, phrase: str) -> list[list[int]]:
        """All sequences of ids that say a phrase; BOS before those that only a caption's beginning can have."""
        ...

    def usual_spellings(self, phrase: str) -> list[list[int]]:
        """A phrase as it is usually spelled: inside a caption, and where that differs, after BOS, at its beginning."""
        ...


@dataclass(frozen=True, slots=True)
class Decoded:
    """The captions of a batch, the best first; those drawn, as they came.

    Attributes:
        tokens: (B, n, T) int64, each caption ``BOS w1 … wn EOS`` and then EOS as padding; a caption that
            reached ``max_tokens`` may end without EOS.
        lengths: (B, n) int64, valid tokens with BOS and, where there is one, EOS.
        scores: (B, n) float32, as the method defines them, in nats; -inf for an empty place: too few words for n.
        token_log_probs: (B, n, T) float32, of each token after those before it, as the method weighed it; 0 for BOS, a
            prefix and padding.
        ended: (B, n) bool, whether EOS was reached.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    token_log_probs: Tensor
    ended: Tensor

    def __post_init__(self) -> None:
        assert self.tokens.ndim == 3
        assert self.tokens.shape[:2] == self.lengths.shape == self.scores.shape == self.ended.shape
        assert self.tokens.shape == self.token_log_probs.shape


@dataclass(frozen=True, kw_only=True)
class Decoding(ABC):
    """A decoding method with its settings, checked when it is built.

    Attributes:
        max_tokens: the longest caption, BOS and EOS counted; one that gets there is cut.
        min_tokens: EOS is forbidden while a caption has fewer tokens than this, BOS counted (what
            transformers calls ``min_length``): 2 asks for at least one word, 0 for nothing.
        repetition_penalty, no_repeat_ngram_size: see `Rules`.
        banned: words and phrases that no caption has.
        prefix: how every caption begins, such as "a photo of"; it counts in `max_tokens`.
        evidence: weight of what the picture alone says for each word; whoever makes the step function adds it, see
            `efficap.models.evidence`.
        batch_size: pictures decoded at a time; None: as many as free memory holds. It changes no caption.

    Raises:
        InputError: an option is out of its range.
    """

    method: ClassVar[str]
    max_tokens: int
    min_tokens: int
    repetition_penalty: float
    no_repeat_ngram_size: int
    banned: Sequence[str]
    prefix: str
    # the runs of earlier versions have neither
    evidence: float = 0.0
    batch_size: int | None = None

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

        penalty = self.repetition_penalty
        require(
            is_number(penalty) and 0.01 <= penalty <= 100,
            "repetition_penalty",
            penalty,
            "must be a number from 0.01 to 100; 1 changes nothing",
        )
        size = self.no_repeat_ngram_size
        require(
            is_whole(size) and size >= 0,
            "no_repeat_ngram_size",
            size,
            "must be a whole number of at least 0; 0 forbids nothing",
        )
        require(
            is_phrases(self.banned),
            "banned",
            self.banned,
            "must be a list of words or phrases; [] bans nothing",
        )
        require(isinstance(self.prefix, str), "prefix", self.prefix, "must be text; '' for none")
        require(
            is_number(self.evidence) and 0 <= self.evidence <= 10,
            "evidence",
            self.evidence,
            "must be a number from 0 to 10; 0 leaves it out, 0.5 does well after training.hidden_captions",
        )
        require(
            self.batch_size is None or (is_whole(self.batch_size) and self.batch_size >= 1),
            "batch_size",
            self.batch_size,
            "must be a whole number of at least 1; use null for as many pictures as free memory holds",
        )

    @property
    def rows(self) -> int:
        """R / B: the rows of an image that the step function is called with, its beams or samples."""
        return max(getattr(self, "num_beams", 1), getattr(self, "num_return_sequences", 1))

    @torch.no_grad()
    def decode(
        self,
        step: Step,
        image_ids: Sequence[str],
        *,
        bos_id: int,
        eos_id: int,
        device: torch.device | str,
        vocabulary: Vocabulary | None = None,
    ) -> Decoded:
        """Captions of a batch.

        An image that is done leaves the batch. `bos_id` may equal `eos_id`: the first token never counts as an end.

        Args:
            step: the model's step function, with a fresh cache for these images.
            image_ids: B keys, in the order of the step's rows; sampling draws by them.
            bos_id, eos_id: token ids.
            device: where `step` expects its ids.
            vocabulary: spells what `prefix` and `banned` say; needed where they say anything.

        Raises:
            InputError: the step's logits are not finite, or the prefix leaves no room or is banned.
        """
        assert image_ids, "an empty batch"
        device = torch.device(device)
        rules = self._rules(bos_id, eos_id, device, vocabulary)
        decoded = self._search(step, image_ids, rules, device)
        broken = (~decoded.scores[:, 0].isfinite()).nonzero().flatten().tolist()
        if broken:
            raise InputError(
                f"the model's logits are NaN or infinite for {len(broken)} of {len(image_ids)} images, the "
                f"first is {image_ids[broken[0]]}; its weights have diverged: use another checkpoint, or "
                "train with a lower learning rate"
            )
        return decoded

    def _rules(self, bos_id: int, eos_id: int, device: torch.device, vocabulary: Vocabulary | None) -> Rules:
        assert vocabulary is not None or not (self.prefix or self.banned), "words cannot be spelled"
        prompt = [bos_id, *(vocabulary.encode_prefix(self.prefix) if vocabulary and self.prefix else [])]
        require(
            len(prompt) < self.max_tokens,
            "prefix",
            repr(self.prefix),
            f"has {len(prompt)} tokens with BOS and leaves no room in decoding.max_tokens={self.max_tokens}",
        )
        require(
            eos_id not in prompt[1:], "prefix", repr(self.prefix), "must be words; the end of a text is none"
        )
        banned = [ids for phrase in self.banned for ids in vocabulary.spellings(phrase)] if vocabulary else []
        rules = Rules(
            prompt=prompt,
            eos_id=eos_id,
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            banned=banned,
            device=device,
        )
        require(
            not rules.bans_part_of(prompt),
            "prefix",
            repr(self.prefix),
            f"must not say what decoding.banned={list(self.banned)} forbids; change one of them",
        )
        return rules

    @abstractmethod
    def _search(
        self, step: Step, image_ids: Sequence[str], rules: Rules, device: torch.device
    ) -> Decoded: ...


def read_prompt(step: Step, prompt: Sequence[int], images: int, device: torch.device) -> Tensor:
    """Feed BOS and the prefix to one row of each image; the (B, V) logits of the word after them."""
    for token in prompt:
        logits = step(torch.full((images,), token, device=device), None, None)
    return logits.float()


def ended(tokens: Tensor, lengths: Tensor, prompt: int, eos_id: int) -> Tensor:
    """(B, n) bool, whether the last of a caption's tokens is an EOS, and not its prompt's."""
    last = tokens.gather(-1, (lengths - 1)[..., None])[..., 0]
    return (last == eos_id) & (lengths > prompt)


def require(condition: bool, option: str, value: object, rule: str) -> None:
    """Raises InputError ``decoding.<option>=<value> <rule>`` unless `condition` holds."""
    if not condition:
        raise InputError(f"decoding.{option}={value} {rule}")


def is_whole(value: object) -> bool:
    """Whether `value` is an int (a bool is none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_phrases(value: object) -> bool:
    """Whether `value` is a list of texts that say something."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(phrase, str) and phrase.strip() for phrase in value)
    )


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
