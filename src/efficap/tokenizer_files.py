"""The files in which tokenizers are published, and where they say what begins and ends a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from efficap.errors import InputError

END_OF_TEXT = "<|endoftext|>"
# A byte-level BPE's files by today's names and by OpenAI's.
_BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "config.json")
SETTING = "model.tokenizer.name"
WAY_OUT = (
    "give a directory with tokenizer.json, or vocab.json and merges.txt, "
    "or model.tokenizer.name=null to learn one from the captions"
)


def tokenizer_files(name: str, names: Sequence[str]) -> list[str]:
    """Of a model's files those that its tokenizer is read from."""
    if "tokenizer.json" in names:
        return ["tokenizer.json"]
    for pair in _BPE_FILES:
        if set(pair) <= set(names):
            return list(pair)
    pieces = next((file for file in names if file.endswith((".model", ".spm"))), None)
    if pieces:
        raise InputError(
            f"{SETTING}={name} holds a sentencepiece model ({pieces}) alone, which is not read; transformers' "
            f"AutoTokenizer.from_pretrained(…).save_pretrained(DIR) makes a tokenizer.json of it; {WAY_OUT}"
        )
    raise InputError(
        f"{SETTING}={name} holds neither tokenizer.json nor vocab.json and merges.txt; {WAY_OUT}"
    )


def read_tokenizer(file: Path) -> Tokenizer:
    """A tokenizer.json.

    Raises:
        InputError: it is damaged.
    """
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{file} is damaged or no tokenizer ({error})") from error


def read_bpe(vocabulary: Path, merges: Path) -> models.BPE:
    """A byte-level BPE's two files.

    Raises:
        InputError: they are damaged.
    """
    try:
        return models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"{vocabulary} and {merges} cannot be read ({error})") from error


def bos_and_eos(directory: Path, tokenizer: Tokenizer) -> tuple[str, str]:
    """The names of the special tokens.

    Ids count for least: many a config.json has kept GPT-2's with another vocabulary.
    """
    names: dict[str, str] = {}
    for file in SETTINGS_FILES:
        settings = _settings(directory / file)
        for token in ("bos_token", "eos_token"):
            said, number = settings.get(token), settings.get(f"{token}_id")
            if isinstance(said, dict):
                said = said.get("content")
            if said is None and isinstance(number, int) and tokenizer.token_to_id(END_OF_TEXT) is None:
                said = tokenizer.id_to_token(number) if 0 <= number < 1 << 32 else None
            if isinstance(said, str):
                names.setdefault(token, said)
    eos = names.get("eos_token", END_OF_TEXT)
    known = tokenizer.token_to_id(END_OF_TEXT) is not None
    return names.get("bos_token", END_OF_TEXT if known else eos), eos


def _settings(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error})") from error
    return content if isinstance(content, dict) else {}
