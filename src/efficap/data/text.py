"""What captions look like before anybody reads them: cleaned, and those that should not be learned left out."""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from efficap.errors import InputError

_FINAL = ".!?…\u3002\uff01\uff1f"


class CaptionText:
    """Cleans captions, and chooses those to learn from.

    Cleaning (see `cleaned`) comes before every tokenizer and scorer, in training and evaluation.
    The filters choose among training captions alone: a reference stays a reference.

    Args:
        lowercase: lower-case everything.
        final_stop: ``keep`` what is there, ``add`` a full stop where a caption ends without, or ``remove`` it.
        min_words, max_words: shortest and longest caption to learn from; None: no limit.
        exclude: a regular expression; captions in which it is found are not learned; None: none.

    Attributes:
        left_out: number of training captions that were not learned, by reason; whoever reads them for the first time
            adds those that `learnable` tells of.

    Raises:
        InputError: limits that contradict each other, an unknown word, or no regular expression.
    """

    def __init__(
        self,
        *,
        lowercase: bool,
        final_stop: str,
        min_words: int | None,
        max_words: int | None,
        exclude: str | None,
    ) -> None:
        if final_stop not in ("keep", "add", "remove"):
            raise InputError(f"data.text.final_stop={final_stop} must be keep, add or remove")
        low, high = min_words or 0, max_words
        if low < 0 or (high is not None and high < max(1, low)):
            raise InputError(
                f"data.text.min_words={min_words} and data.text.max_words={max_words} leave no caption; "
                "null is no limit"
            )
        try:
            self.exclude = re.compile(exclude) if exclude is not None else None
        except re.error as error:
            raise InputError(f"data.text.exclude={exclude} is no regular expression: {error}") from error
        self.lowercase, self.final_stop = lowercase, final_stop
        self.min_words, self.max_words = low, high
        self.left_out: Counter[str] = Counter()

    def clean(self, caption: str) -> str:
        """The caption as it is learned and scored; empty where nothing is left."""
        caption = cleaned(caption)
        if self.lowercase:
            caption = caption.lower()
        if self.final_stop == "add" and caption and caption[-1] not in _FINAL:
            caption += "."
        elif self.final_stop == "remove":
            caption = caption.rstrip(" .\u3002")
        return caption

    def learnable(self, captions: Sequence[str]) -> tuple[list[int], Counter[str]]:
        """Numbers of the cleaned captions that training learns from; and how many others there are, by reason."""
        chosen: list[int] = []
        left_out: Counter[str] = Counter()
        for number, caption in enumerate(captions):
            reason = self._why_not(caption)
            if reason is None:
                chosen.append(number)
            else:
                left_out[reason] += 1
        return chosen, left_out

    def _why_not(self, caption: str) -> str | None:
        if not caption:
            return "empty"
        words = caption.count(" ") + 1
        if words < self.min_words:
            return f"fewer than {self.min_words} words"
        if self.max_words is not None and words > self.max_words:
            return f"more than {self.max_words} words"
        if self.exclude is not None and self.exclude.search(caption):
            return f"matches {self.exclude.pattern}"
        return None


def cleaned(caption: str) -> str:
    """A caption as one line of plain text; empty where nothing is left.

    HTML entities become characters, then Unicode NFC, control characters, characters of no width (U+200B, U+2060,
    U+FEFF) and lone surrogates go, any white space becomes one space.
    """
    if not caption.isascii() or "&" in caption:
        caption = unicodedata.normalize("NFC", html.unescape(caption))
    if not caption.isprintable():
        caption = "".join(char if _is_text(char) else " " * char.isspace() for char in caption)
    return " ".join(caption.split())


def _is_text(char: str) -> bool:
    return unicodedata.category(char) not in ("Cc", "Cs", "Co", "Cn") and char not in "\u200b\u2060\ufeff"
