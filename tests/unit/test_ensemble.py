"""Several models as one, against a search that reads every caption from its beginning.

R rows, V words.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    BEAM,
    BOS,
    CONSTRAINED,
    DIVERSE,
    EOS,
    GREEDY,
    NUCLEUS,
    GPT2Pair,
    Recurrent,
    captions,
    ids,
    run,
)

from efficap.decoding import build_decoding
from efficap.decoding.ensemble import AveragedStep

WORDS, LONGEST, IMAGES = 4, 5, 3


def models(vocabulary: int = WORDS) -> list[Recurrent]:
    """Two that disagree; the seed differs, and so do their pictures' states."""
    return [Recurrent(IMAGES, vocabulary, seed, eos_bonus=seed / 4) for seed in (1, 2)]


def probabilities(model: Recurrent, image: int, tokens: tuple[int, ...]) -> Tensor:
    """(V,) of the word after `tokens`, all of which are read anew."""
    state = model.start[image : image + 1]
    for token in tokens:
        state = model.read(state, torch.tensor([token]))
    return model.logits(state)[0].softmax(dim=-1)


def mean_probability(image: int, tokens: tuple[int, ...]) -> Tensor:
    return torch.stack([probabilities(model, image, tokens) for model in models()]).mean(dim=0)


def every_caption() -> list[tuple[int, ...]]:
    """All that end with EOS, and those that are cut at the longest length."""
    others = [word for word in range(WORDS) if word != EOS]
    ended = [
        (BOS, *words, EOS)
        for length in range(LONGEST - 1)
        for words in itertools.product(others, repeat=length)
    ]
    return ended + [(BOS, *words) for words in itertools.product(others, repeat=LONGEST - 1)]


def log_probability(image: int, caption: tuple[int, ...]) -> float:
    return sum(
        math.log(mean_probability(image, caption[:place])[caption[place]]) for place in range(1, len(caption))
    )


def averaged(rows: list[int] | None = None, vocabulary: int = WORDS) -> AveragedStep:
    return AveragedStep([model.step(rows) for model in models(vocabulary)])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_wide_beam_finds_the_best_of_all_captions_by_mean_probability(length_penalty: float) -> None:
    wide = BEAM | {"max_tokens": LONGEST, "num_beams": 81, "length_penalty": length_penalty}
    decoded = run(build_decoding(wide), averaged(), ids(IMAGES))
    for image in range(IMAGES):
        scores = {
            caption: log_probability(image, caption) / (len(caption) - 1) ** length_penalty
            for caption in every_caption()
        }
        best = max(scores, key=lambda caption: scores[caption])
        assert captions(decoded)[image][0] == list(best)
        assert float(decoded.scores[image, 0]) == pytest.approx(scores[best], abs=1e-5)


def test_greedy_takes_the_word_with_the_largest_mean_probability() -> None:
    decoded = run(build_decoding(GREEDY | {"max_tokens": LONGEST}), averaged(), ids(IMAGES))
    differs = False
    for image in range(IMAGES):
        caption: tuple[int, ...] = (BOS,)
        while len(caption) < LONGEST and (len(caption) == 1 or caption[-1] != EOS):
            caption += (int(mean_probability(image, caption).argmax()),)
        assert captions(decoded)[image] == [list(caption)]
        alone = [
            run(build_decoding(GREEDY | {"max_tokens": LONGEST}), m.step(), ids(IMAGES)) for m in models()
        ]
        differs |= any(captions(one)[image] != [list(caption)] for one in alone)
    assert differs, "the models agree, and the test shows nothing"


def test_the_mean_is_of_probabilities_not_of_logits() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.2, 0.1]])
    step = AveragedStep([lambda *_: sure, lambda *_: unsure])
    expected = ((sure.softmax(-1) + unsure.softmax(-1)) / 2).log()
    torch.testing.assert_close(step(torch.zeros(1, dtype=torch.int64), None, None), expected)


def test_impossible_words_stay_so_and_tiny_probabilities_are_told_apart() -> None:
    logits = torch.tensor([[0.0, -200.0, -300.0, -math.inf]])
    mean = AveragedStep([lambda *_: logits, lambda *_: logits.bfloat16()])(torch.zeros(1).long(), None, None)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, logits.log_softmax(-1))


@pytest.mark.parametrize("settings", [GREEDY, BEAM, DIVERSE, CONSTRAINED, NUCLEUS], ids=lambda s: s["method"])
def test_a_model_with_itself_writes_as_it_does_alone(settings: dict[str, Any]) -> None:
    """The real cache, whose rows follow their parents and whose pictures leave the batch."""
    pair, decoding = GPT2Pair(0, eos_id=EOS), build_decoding(settings)
    both = AveragedStep([pair.step(8), pair.step(8)])
    alone, together = run(decoding, pair.step(8), ids(4)), run(decoding, both, ids(4))
    assert captions(together) == captions(alone)
    torch.testing.assert_close(together.scores, alone.scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [BEAM, NUCLEUS], ids=lambda s: s["method"])
def test_models_of_several_shapes_caption_a_picture_as_in_any_batch(settings: dict[str, Any]) -> None:
    decoding = build_decoding(settings)
    pair, small = GPT2Pair(0, eos_id=EOS), models(23)

    def step(rows: list[int]) -> AveragedStep:
        return AveragedStep([pair.step(8, rows), small[0].step(rows), small[1].step(rows)])

    together = captions(run(decoding, step([0, 1, 2]), ids(3)))
    assert together == [captions(run(decoding, step([row]), [name]))[0] for row, name in enumerate(ids(3))]
