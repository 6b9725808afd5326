"""The words of a training: the tokenizer that divides its captions, and what a new decoder knows of them at first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from efficap.commands.run_dir import RunDirectory
from efficap.commands.stages import naming
from efficap.data.caption_data import CaptionData
from efficap.models.gpt2 import GPT2
from efficap.models.word_vectors import word_vectors
from efficap.ranks import from_first
from efficap.tokenizer import CaptionTokenizer


def tokenizer_of(
    settings: dict[str, Any],
    data: dict[str | None, CaptionData],
    resumed: RunDirectory | None,
    init_from: RunDirectory | None,
    *,
    counts: bool,
) -> CaptionTokenizer:
    """A run's that goes on, a pretrained one, or one that is learned from the captions of all stages.

    Args:
        counts: whether it has to know how often its tokens stand at each place.
    """
    if resumed:
        return resumed.tokenizer()
    if init_from and settings == init_from.config["model"]["tokenizer"]:
        tokenizer = init_from.tokenizer()
    elif settings["name"] is not None:
        tokenizer = CaptionTokenizer.pretrained(settings["name"])
    else:
        tokenizer = CaptionTokenizer.learn(captions_of(data), settings["vocab_size"])
    if counts:  # also where init_from has some, of other captions
        tokenizer.count_places(captions_of(data))
    return tokenizer


def captions_of(data: dict[str | None, CaptionData]) -> Iterator[str]:
    """The training captions of all stages, once."""
    for its_data, name in owners(data).items():
        with naming(name):
            yield from its_data.training_captions()


def owners(data: dict[str | None, CaptionData]) -> dict[CaptionData, str | None]:
    """Each of the data once, with the first stage that has it."""
    first: dict[CaptionData, str | None] = {}
    for name, its_data in data.items():
        first.setdefault(its_data, name)
    return first


def teach_words(decoder: GPT2, captions: Iterable[str], tokenizer: CaptionTokenizer) -> None:
    """Add, to the random vectors of a decoder that starts from nothing, those of the words that its captions have.

    Both weigh alike: "red" and "blue", which may have the same neighbours throughout, have to be told apart.
    """

    def vectors() -> Tensor:
        ids, _ = tokenizer.encode(list(captions), decoder.wpe.num_embeddings)
        return word_vectors(ids, *decoder.wte.weight.shape)

    with torch.no_grad():
        decoder.wte.weight += from_first(vectors, "the words' vectors")  # (V, D)
