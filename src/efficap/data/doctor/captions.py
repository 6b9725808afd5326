"""Captions counted: how many there are of a picture, how long they are, which are too long."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from efficap.data.doctor.findings import Finding
from efficap.errors import InputError
from efficap.tokenizer import CaptionTokenizer

SHOWN = 80  # characters of a caption that is named


@dataclass(frozen=True, slots=True)
class CaptionLimit:
    """How long a caption may be: in words or, where a tokenizer is named, in its tokens, BOS and EOS counted."""

    words: int
    tokens: int
    tokenizer: str | None

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.tokenizer else f"{self.words} words"

    def exceeded(self, captions: Sequence[str], words: Sequence[int]) -> list[int]:
        """Which of the captions are longer, given their lengths in words."""
        if self.tokenizer is None:
            return [number for number, length in enumerate(words) if length > self.words]
        texts = [
            caption.encode("utf-8", "replace").decode() for caption in captions
        ]  # JSON may hold half a surrogate
        ids, _ = load_tokenizer(self.tokenizer).encode(texts, self.tokens + 1)
        return [number for number, caption in enumerate(ids) if len(caption) > self.tokens]


@functools.cache
def load_tokenizer(name: str) -> CaptionTokenizer:
    """The tokenizer of a directory or the hub, once a process.

    Raises:
        InputError: there is none.
    """
    try:
        return CaptionTokenizer.pretrained(name)
    except InputError as error:
        raise InputError(f"--tokenizer {name}: {error}") from error


@dataclass(slots=True)
class CaptionTally:
    """What is known of all captions together.

    Attributes:
        captions: their number.
        words: how many captions have so many words.
        per_picture: how many pictures have so many captions.
        long: those that are too long.
    """

    limit: CaptionLimit
    captions: int = 0
    words: Counter[int] = field(default_factory=Counter)
    per_picture: Counter[int] = field(default_factory=Counter)
    long: Finding = field(init=False)

    def __post_init__(self) -> None:
        advice = "training cuts what goes beyond data.max_tokens"
        self.long = Finding(f"captions of more than {self.limit}", advice=advice)

    def add(self, name: str, captions: Sequence[str]) -> None:
        """All captions of a picture."""
        lengths = [len(caption.split()) for caption in captions]
        self.captions += len(captions)
        self.words.update(lengths)
        self.per_picture[len(captions)] += 1
        for number in self.limit.exceeded(captions, lengths):
            text = captions[number]
            cut = text if len(text) <= SHOWN else text[:SHOWN] + "…"
            self.long.add(f"{name} ({lengths[number]} words): {cut}")

    def merge(self, other: CaptionTally) -> None:
        """All that another tally with the same limit counted."""
        self.captions += other.captions
        self.words.update(other.words)
        self.per_picture.update(other.per_picture)
        self.long.merge(other.long)
