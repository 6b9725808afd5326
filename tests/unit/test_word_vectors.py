"""Word vectors from captions: what they are by numpy's definition, and what they say of words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from efficap.commands.words import teach_words
from efficap.models.gpt2 import GPT2
from efficap.models.word_vectors import SMOOTHING, STD, word_vectors
from efficap.tokenizer import CaptionTokenizer


def captions_of(rng: np.random.Generator, vocab_size: int, count: int = 400) -> list[list[int]]:
    """Words that follow each other by a table of chances, between BOS and EOS, both 0."""
    chances = rng.dirichlet(np.full(vocab_size - 1, 0.1), size=vocab_size)
    captions = []
    for _ in range(count):
        caption = [0]
        for _ in range(rng.integers(1, 9)):
            caption.append(1 + int(rng.choice(vocab_size - 1, p=chances[caption[-1]])))
        captions.append([*caption, 0])
    return captions


def by_numpy(captions: list[list[int]], vocab_size: int, width: int) -> np.ndarray:
    """The cosines between words that there are, counted pair by pair, by a singular value decomposition of all."""
    counts = np.zeros((vocab_size, vocab_size))
    for caption in captions:
        for before, after in itertools.pairwise(caption):
            counts[before, after] += 1
    halves = []
    for table in (counts.T, counts):  # who stands before, who after
        chance = table.sum(0) ** SMOOTHING / (table.sum(0) ** SMOOTHING).sum()
        with np.errstate(divide="ignore", invalid="ignore"):
            more = np.log(table / (table.sum(1, keepdims=True) * chance))
        more = np.where(np.isfinite(more), np.maximum(more, 0), 0)
        halves.append(more / np.linalg.norm(more))
    left, values, _ = np.linalg.svd(np.concatenate(halves, axis=1))
    vectors = left[:, :width] * np.sqrt(values[:width])
    vectors = vectors[counts.any(1) | counts.any(0)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def test_words_are_as_near_as_numpy_has_them() -> None:
    captions = captions_of(np.random.default_rng(0), 40)
    vectors = word_vectors(captions, 40, 24)
    unit = F.normalize(vectors, dim=1)
    assert np.allclose((unit @ unit.T).numpy(), by_numpy(captions, 40, 24), atol=1e-4)
    assert vectors.pow(2).mean().sqrt().item() == pytest.approx(STD, rel=1e-4)


def test_words_between_like_neighbours_are_near_each_other() -> None:
    a, man, dog, red, blue, runs, sits = range(1, 8)
    captions = [
        [0, a, colour, who, does, 0] for colour in (red, blue) for who in (man, dog) for does in (runs, sits)
    ]
    vectors = F.normalize(word_vectors(captions, 8, 6), dim=1)
    nearest = (vectors @ vectors.T - 2 * torch.eye(8)).argmax(dim=1)
    assert nearest[[man, dog, red, blue, runs, sits]].tolist() == [dog, man, blue, red, sits, runs]


def test_a_word_that_no_caption_has_gets_no_vector() -> None:
    vectors = word_vectors([[0, 1, 2, 0], [0, 2, 1, 0]], 6, 4)
    assert (vectors.norm(dim=1) > 0).tolist() == [True, True, True, False, False, False]


def test_a_vocabulary_smaller_than_the_width_has_vectors() -> None:
    captions = captions_of(np.random.default_rng(1), 10)
    vectors = word_vectors(captions, 10, 64)
    unit = F.normalize(vectors[vectors.any(dim=1)], dim=1)
    assert np.allclose((unit @ unit.T).numpy(), by_numpy(captions, 10, 10), atol=1e-4)


def test_a_new_decoder_begins_with_the_vectors_of_the_words_that_captions_have() -> None:
    captions = ["a red dog runs", "a blue dog sits", "a red man sits", "a blue man runs"]
    tokenizer = CaptionTokenizer.learn(captions, 280)
    decoder = GPT2(vocab_size=280, n_positions=16, n_embd=32, n_layer=1, n_head=2, dropout=0.0)
    before = decoder.wte.weight.detach().clone()
    state = torch.random.get_rng_state()
    teach_words(decoder, captions, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)  # processes draw alike afterwards
    weight = decoder.wte.weight.detach()
    is_new = (weight != before).any(dim=1)
    ids = {number for caption in tokenizer.encode(captions, 16)[0] for number in caption}
    assert set(is_new.nonzero().flatten().tolist()) == ids
    unit = F.normalize(weight, dim=1)
    red, blue, runs, sits = (tokenizer.encode_prefix(word)[0] for word in ("red", "blue", "runs", "sits"))
    assert 0.9 > unit[red] @ unit[blue] > 0.25 > unit[red] @ unit[runs]  # alike, and still told apart
    assert 0.9 > unit[runs] @ unit[sits] > 0.25


def test_no_captions_are_no_vectors() -> None:
    assert not word_vectors([], 6, 4).any()
