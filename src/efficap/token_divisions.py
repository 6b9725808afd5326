"""All ways to write a text in the tokens of a byte-level BPE, not only the tokenizer's own."""

from __future__ import annotations

from tokenizers import Tokenizer

from efficap.errors import InputError

MOST = 20_000  # divisions of a text


class TokenDivisions:
    """Divides texts into tokens; a tokenizer that is no byte-level BPE has its own way alone.

    Listing GPT-2's vocabulary takes a while: keep it.

    Args:
        tokenizer: whose added tokens are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids = tokenizer.get_vocab(with_added_tokens=False)
        self._longest = max(map(len, self._ids), default=0)  # bytes
        tokens = tokenizer.encode(" é", add_special_tokens=False).tokens
        self._is_byte_level = "".join(tokens) == in_bytes(" é")

    def of(self, text: str) -> list[list[int]]:
        """The ids of each division.

        Raises:
            InputError: there are more than `MOST`.
        """
        if not self._is_byte_level:  # how others join their tokens is not known here
            return [list(self._tokenizer.encode(text, add_special_tokens=False).ids)]
        spelled = in_bytes(text)
        ways: list[list[list[int]]] = [[[]]]  # of the first 0, 1, 2, … bytes
        for end in range(1, len(spelled) + 1):
            ways.append(
                [
                    [*before, self._ids[spelled[start:end]]]
                    for start in range(max(0, end - self._longest), end)
                    if spelled[start:end] in self._ids
                    for before in ways[start]
                ]
            )
            if len(ways[end]) > MOST:
                raise InputError(f"decoding.banned: {text.strip()!r} is too long; give single words")
        return ways[-1]


def in_bytes(text: str) -> str:
    """A text as a byte-level BPE spells it, a letter for each byte."""
    return "".join(_BYTE_NAMES[byte] for byte in text.encode())


def _byte_names() -> dict[int, str]:
    """The letter that stands for each byte: itself where it can be seen (GPT-2's rule)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    names = {byte: chr(byte) for byte in visible}
    return names | {byte: chr(256 + number) for number, byte in enumerate(others)}


_BYTE_NAMES = _byte_names()
