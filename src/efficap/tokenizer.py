"""Text to ids and back: the one place that knows who BOS, EOS and padding are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelProcessor

from efficap.errors import InputError
from efficap.hub import pretrained_files
from efficap.token_divisions import TokenDivisions
from efficap.tokenizer_files import (
    END_OF_TEXT,
    SETTING,
    SETTINGS_FILES,
    WAY_OUT,
    bos_and_eos,
    read_bpe,
    read_tokenizer,
    tokenizer_files,
)
from efficap.word_places import (
    CAPTIONS,
    PLACES,
    Frequencies,
    load_frequencies,
    place_frequencies,
    save_frequencies,
)

MOST_IDS = 1 << 24  # of any tokenizer there is a quarter of a million; a made-up one can name the id 2**32
_WORD = re.compile(r"\s*(\w+(?:[-'’]\w+)*|[^\w\s]+)")  # noqa: RUF001


class CaptionTokenizer:
    """A tokenizer with a token that begins and one that ends a caption; GPT-2's has one for both, ``<|endoftext|>``.

    GPT-2 puts that token between texts, so it is BOS and EOS alike: it is read only at the first position and
    written only at the last. Padding is EOS too and is told apart by length, never by id.

    Args:
        tokenizer: in any form that the tokenizers library reads.
        bos, eos: the special tokens' names.

    Attributes:
        bos_id, eos_id, pad_id: int.
        vocab_size: one more than the largest id, special tokens included.
        frequencies: (T, V) of each token at each of the first T places of captions; None unless they were counted.

    Raises:
        InputError: it has no such tokens, or ids beyond `MOST_IDS`.
    """

    def __init__(self, tokenizer: Tokenizer, bos: str = END_OF_TEXT, eos: str = END_OF_TEXT) -> None:
        ids = []
        for token in (bos, eos):
            number = tokenizer.token_to_id(token)
            if number is None:
                raise InputError(
                    f"the tokenizer has no token {token} to begin or end a caption; GPT-2's have {END_OF_TEXT}, "
                    "others name theirs in tokenizer_config.json as bos_token and eos_token"
                )
            ids.append(int(number))
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        # Others keep their ids, and decoding leaves them out.
        tokenizer.add_special_tokens(sorted({bos, eos} - special))
        tokenizer.no_padding()  # either may be saved in a tokenizer.json
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._names = (bos, eos)
        self.frequencies: Frequencies | None = None
        self.bos_id, self.eos_id = ids
        self.pad_id = self.eos_id
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())  # ids may have gaps
        if self.vocab_size > MOST_IDS:
            raise InputError(
                f"the tokenizer has the id {self.vocab_size - 1:,}; they must be below {MOST_IDS:,}"
            )

    @classmethod
    def pretrained(cls, name: str) -> CaptionTokenizer:
        """A published tokenizer from a directory or a hub name.

        Read are tokenizer.json of any kind, and a byte-level BPE's vocab.json and merges.txt, which OpenAI calls
        encoder.json and vocab.bpe. BOS and EOS are those of tokenizer_config.json, special_tokens_map.json or
        config.json, else GPT-2's.

        Raises:
            InputError: nothing of the kind is there, or there is no network.
        """

        def choose(names: Sequence[str]) -> list[str]:
            return [*tokenizer_files(name, names), *(file for file in SETTINGS_FILES if file in names)]

        usual = ("tokenizer.json", "tokenizer_config.json")
        directory = pretrained_files(SETTING, name, choose, usual, WAY_OUT)
        files = tokenizer_files(name, [file.name for file in directory.iterdir()])
        if files == ["tokenizer.json"]:
            tokenizer = read_tokenizer(directory / files[0])
            return cls(tokenizer, *bos_and_eos(directory, tokenizer))
        tokenizer = _byte_level(read_bpe(*(directory / file for file in files)), add_prefix_space=False)
        bos, eos = bos_and_eos(directory, tokenizer)
        tokenizer.add_special_tokens([bos, eos])
        return cls(tokenizer, bos, eos)

    @classmethod
    def learn(cls, captions: Iterable[str], vocab_size: int) -> CaptionTokenizer:
        """Learn a byte-level BPE of at most `vocab_size` ids from captions.

        Raises:
            InputError: fewer than the 256 bytes and the special token.
        """
        smallest = len(pre_tokenizers.ByteLevel.alphabet()) + 1
        if vocab_size < smallest:
            raise InputError(
                f"model.tokenizer.vocab_size={vocab_size} must be at least {smallest}: 256 bytes and {END_OF_TEXT}"
            )
        # With a space before it, the first word of a caption is the same token as elsewhere.
        tokenizer = _byte_level(models.BPE(), add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer)

    def with_bos(self, names: Sequence[str]) -> CaptionTokenizer:
        """The same with more special tokens, whose ids follow its own; the first of them begins captions."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.add_special_tokens(list(names))
        return CaptionTokenizer(tokenizer, names[0], self._names[1])

    @classmethod
    def load(cls, directory: Path) -> CaptionTokenizer:
        """What `save` wrote.

        Raises:
            InputError: no tokenizer is there.
        """
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{file} does not exist; a run directory holds its tokenizer there")
        tokenizer = read_tokenizer(file)
        loaded = cls(tokenizer, *bos_and_eos(directory, tokenizer))
        loaded.frequencies = load_frequencies(directory, loaded.vocab_size)
        return loaded

    def count_places(self, captions: Iterable[str]) -> None:
        """Count how often each token stands at each place of captions, or of 50,000 from all over them."""
        texts = list(captions)
        ids, _ = self.encode(texts[:: max(1, math.ceil(len(texts) / CAPTIONS))], PLACES + 2)
        self.frequencies = place_frequencies(ids, self.vocab_size)

    def ids_in(self, other: CaptionTokenizer) -> list[int]:
        """For each id the other's id of the same token, -1 where it has none; BOS and EOS are the other's."""
        theirs = other._tokenizer.get_vocab(with_added_tokens=True)
        own = self._tokenizer.get_vocab(with_added_tokens=True)
        ids = [-1] * self.vocab_size
        for token, number in own.items():
            ids[number] = theirs.get(token, -1)
        ids[self.bos_id], ids[self.eos_id] = other.bos_id, other.eos_id
        return ids

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and, so that transformers' AutoTokenizer loads it too, tokenizer_config.json."""
        directory.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(directory / "tokenizer.json"))
        bos, eos = self._names
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"bos_token": bos, "eos_token": eos, "pad_token": eos}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_frequencies(self.frequencies, directory)

    def encode(self, captions: Sequence[str], max_tokens: int) -> tuple[list[list[int]], int]:
        """Each caption as ``BOS w1 … wn EOS``; words beyond `max_tokens` ids are cut, EOS stays.

        Returns:
            The ids of each caption, and the number of captions that were cut.
        """
        cut = 0
        encoded = []
        for encoding in self._tokenizer.encode_batch(list(captions), add_special_tokens=False):
            words = encoding.ids
            cut += len(words) > max_tokens - 2
            encoded.append([self.bos_id, *words[: max_tokens - 2], self.eos_id])
        return encoded, cut

    def encode_prefix(self, text: str) -> list[int]:
        """The ids of how a caption begins, as `encode` would begin it; BOS left out."""
        return self._ids(text.strip())

    def _ids(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False).ids]

    def spellings(self, phrase: str) -> list[list[int]]:
        """All ways to say a phrase in ids, in lower case, as given and capitalised.

        A caption's first word may be spelled without the space before it; those ways begin with BOS. The ways are all
        divisions of the text into tokens, not only the tokenizer's own: a model may write any of them. A longer word
        that is one token is another word: "cats" is no way to say "cat", but "cat" and then "s" begins with one.

        Raises:
            InputError: there are too many.
        """
        phrase = " ".join(phrase.split())
        ways: list[list[int]] = []
        for form in dict.fromkeys((phrase, phrase.lower(), phrase.capitalize())):
            ways += self._divisions.of(f" {form}")
            ways += [[self.bos_id, *ids] for ids in self._divisions.of(form)]
        return ways

    def usual_spellings(self, phrase: str) -> list[list[int]]:
        """How the tokenizer spells a phrase: inside a caption, and, where that differs, after BOS at its beginning.

        A longer word may begin with the same ids.
        """
        phrase = " ".join(phrase.split())
        inside, first = self._ids(f" {phrase}"), self._ids(phrase)
        return [inside] if inside == first else [inside, [self.bos_id, *first]]

    @cached_property
    def _divisions(self) -> TokenDivisions:
        return TokenDivisions(self._tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out, white space collapsed."""
        return " ".join(self._tokenizer.decode(list(ids), skip_special_tokens=True).split())

    def words(self, ids: Sequence[int]) -> list[tuple[str, list[int]]]:
        """The words of a caption and which of its ids write each: places in `ids`, several for a word in pieces.

        Marks such as commas are words of their own. A word begins with the space before it: all of them, joined, are
        the text that `decode` gives.
        """
        text = self.decode(ids)
        beginnings = [self.decode(ids[:count]) for count in range(len(ids) + 1)]
        agreed = [_agreement(beginning, text) for beginning in beginnings]
        # What does not agree is a character of which some bytes are still to come.
        ends = [place + (place < len(beginning)) for place, beginning in zip(agreed, beginnings, strict=True)]
        spans = list(zip(agreed[:-1], ends[1:], strict=True))
        return [
            (
                match[0],
                [
                    place
                    for place, (start, end) in enumerate(spans)
                    if start < match.end() and end > match.start(1)
                ],
            )
            for match in _WORD.finditer(text)
        ]


def _agreement(one: str, other: str) -> int:
    """How many letters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def _byte_level(model: models.BPE, add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    return tokenizer
