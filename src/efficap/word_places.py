"""How often each token stands at each place of the captions that a tokenizer is for, kept beside it.

T places after BOS, V ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from efficap.errors import InputError

PLACES = 64  # T
CAPTIONS = 50_000  # that are counted at most: more would change nothing that weighs
_SMOOTHING = 100  # captions' worth of a token's frequency anywhere: few captions have late places
_FILE = "places.safetensors"

Frequencies = np.ndarray[Any, np.dtype[np.float32]]


def place_frequencies(captions: Iterable[Sequence[int]], vocab_size: int) -> Frequencies:
    """(T, V), of each token at each place, 0 … 1; EOS counts, BOS does not.

    Args:
        captions: ids, BOS and EOS among them.
    """
    counts = np.zeros((PLACES, vocab_size), np.float32)
    for ids in captions:
        words = ids[1 : PLACES + 1]
        counts[np.arange(len(words)), words] += 1
    anywhere = counts.sum(axis=0) / max(1.0, counts.sum())  # (V,)
    smooth = (counts + _SMOOTHING * anywhere) / (counts.sum(axis=1, keepdims=True) + _SMOOTHING)
    # Rounded as they are kept, so that a resumed training has the same.
    return smooth.astype(np.float16).astype(np.float32)


def save_frequencies(frequencies: Frequencies | None, directory: Path) -> None:
    """Write them; None leaves none of another tokenizer there."""
    if frequencies is None:
        (directory / _FILE).unlink(missing_ok=True)
    else:
        (directory / _FILE).write_bytes(save({"frequencies": frequencies.astype(np.float16)}))


def load_frequencies(directory: Path, vocab_size: int) -> Frequencies | None:
    """What `save_frequencies` wrote; None where it did not.

    Raises:
        InputError: the file is damaged, or of another vocabulary.
    """
    file = directory / _FILE
    if not file.is_file():
        return None
    try:
        frequencies: Frequencies = load_file(file)["frequencies"].astype(np.float32)
    except (SafetensorError, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise InputError(f"{file} is damaged ({error})") from error
    if frequencies.ndim != 2 or not len(frequencies) or frequencies.shape[1] != vocab_size:
        raise InputError(f"{file} has the shape {frequencies.shape}, its tokenizer {vocab_size} tokens")
    if not ((frequencies >= 0) & (frequencies <= 1)).all():
        raise InputError(f"{file} holds what are no frequencies, from 0 to 1")
    return frequencies
