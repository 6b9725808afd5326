"""Beam search against transformers' generate, exhaustive search, and a slow search in groups that is plain to see."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    BEAM,
    BOS,
    DIVERSE,
    EOS,
    GREEDY,
    GPT2Pair,
    Recurrent,
    assert_well_formed,
    captions,
    contains,
    ids,
    run,
)

from efficap.decoding import Beam, build_decoding

# transformers


def random_settings(draw: random.Random, eos_id: int) -> tuple[dict[str, Any], dict[str, Any], list[int]]:
    """Settings of ours, the same of transformers' `generate`, and the prompt."""
    prefix = [draw.randrange(2, 20) for _ in range(draw.choice([0, 0, 1, 3]))]
    max_tokens = draw.randint(len(prefix) + 3, 14)
    # Where BOS is EOS, a size of 1 forbids EOS in transformers, so that no caption ends; here EOS repeats nothing.
    sizes = [0, 0, 1, 2, 3] if eos_id != BOS else [0, 0, 2, 3]
    same = {
        "num_beams": draw.randint(1, 6),
        "length_penalty": draw.choice([-2.0, -0.7, 0.0, 0.6, 1.0, 2.5]),
        "early_stopping": draw.choice([True, False, "never"]),
        "repetition_penalty": draw.choice([1.0, 1.0, 1.3, 0.8]),
        "no_repeat_ngram_size": draw.choice(sizes),
    }
    banned = [
        [draw.randrange(2, 20) for _ in range(draw.randint(1, 3))] for _ in range(draw.choice([0, 0, 2, 6]))
    ]
    banned = [sequence for sequence in banned if not contains(prefix, sequence)]
    if same["num_beams"] == 1:  # searches on after its first caption where "never" says so; theirs does not
        same["early_stopping"] = False
    samples = draw.randint(1, same["num_beams"])
    ours = BEAM | same
    ours |= {"max_tokens": max_tokens, "min_tokens": draw.randint(0, max_tokens - 1)}
    ours |= {"num_return_sequences": samples, "prefix": " ".join(map(str, prefix))}
    ours["banned"] = [" ".join(map(str, sequence)) for sequence in banned]
    if same["num_beams"] == 1:
        ours = {name: ours[name] for name in GREEDY} | {"method": "greedy"}
    theirs = same | {"num_return_sequences": samples, "bad_words_ids": banned or None}
    return ours, theirs, [BOS, *prefix]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_the_real_step_with_random_settings_gives_the_captions_of_transformers(seed: int) -> None:
    draw = random.Random(seed)
    eos_id = draw.choice([BOS, 22])
    pair = GPT2Pair(seed, eos_id=eos_id, eos_bonus=draw.choice([0.0, 2.0, 4.0]))
    lengths = set()
    for _ in range(13):
        settings, options, prompt = random_settings(draw, eos_id)
        decoding = build_decoding(settings)
        decoded = run(decoding, pair.step(decoding.max_tokens), ids(4), eos_id=eos_id)
        assert_well_formed(decoded, decoding, 4, BOS, eos_id)
        expected = pair.generate(decoding, prompt, **options)
        assert decoded.tokens.flatten(0, 1).tolist() == expected.sequences.tolist(), settings
        if isinstance(decoding, Beam):
            scores = decoded.scores.flatten()
            torch.testing.assert_close(scores, expected.sequences_scores, atol=1e-4, rtol=1e-5)
        lengths |= set(decoded.lengths.flatten().tolist())
    assert len(lengths) > 3


# Exhaustive search


def forbidden(caption: list[int], word: int, beam: Beam) -> bool:
    """Whether a rule forbids the next word; the rules as their definitions say them."""
    longer = [*caption, word]
    size = beam.no_repeat_ngram_size
    return (
        (word == EOS and len(caption) < beam.min_tokens)
        or (0 < size <= len(caption) and word != EOS and contains(longer[:-1], longer[-size:]))
        or any(longer[-len(banned) :] == banned for banned in numbers(beam.banned))
    )


def numbers(phrases: Any) -> list[list[int]]:
    return [[int(word) for word in phrase.split()] for phrase in phrases]


def all_captions(
    model: Recurrent, state: Tensor, caption: list[int], score: float, beam: Beam, prompt: int
) -> Iterator[tuple[float, list[int]]]:
    """Every caption that goes on from `caption`, with its score: the definition, without a search."""
    state = model.read(state, torch.tensor(caption[-1]))
    for word, gain in enumerate(model.logits(state).log_softmax(-1).tolist()):
        longer = [*caption, word]
        if forbidden(caption, word, beam):
            continue
        if word == EOS or len(longer) == beam.max_tokens:
            yield (score + gain) / (len(longer) - prompt) ** beam.length_penalty, longer
        else:
            yield from all_captions(model, state, longer, score + gain, beam, prompt)


def ranked_captions(model: Recurrent, image: int, beam: Beam) -> list[tuple[float, list[int]]]:
    state, prompt = model.start[image], [BOS, *map(int, beam.prefix.split())]
    for word in prompt[:-1]:
        state = model.read(state, torch.tensor(word))
    return sorted(all_captions(model, state, prompt, 0.0, beam, len(prompt)), reverse=True)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"min_tokens": 4},
        {"prefix": "2 3", "max_tokens": 7},
        {"no_repeat_ngram_size": 2, "max_tokens": 6},
        {"no_repeat_ngram_size": 1},
        {"banned": ["2", "0 3"]},
        {"banned": ["3 3", "2 0", "0 2 2"], "prefix": "2", "no_repeat_ngram_size": 3, "max_tokens": 6},
    ],
)
def test_a_beam_too_wide_to_prune_finds_the_best_of_all_captions(
    early_stopping: Any, length_penalty: float, limits: dict[str, Any]
) -> None:
    change = {"max_tokens": 5, "num_beams": 100, "length_penalty": length_penalty, **limits}
    beam = build_decoding(BEAM | change | {"early_stopping": early_stopping, "num_return_sequences": 4})
    assert isinstance(beam, Beam)
    model = Recurrent(images=3, vocabulary=4, seed=3)
    decoded = run(beam, model.step(), ids(3))
    for image, found in enumerate(captions(decoded)):
        best = ranked_captions(model, image, beam)[:4]
        assert found == [caption for _, caption in best]
        assert decoded.scores[image].tolist() == pytest.approx([score for score, _ in best], abs=1e-5)


# Groups


def groups_in_plain_words(beam: Beam, model: Recurrent, image: int) -> list[tuple[float, list[int]]]:
    """Diverse beam search for one image, beam by beam; all groups' captions, the best first."""
    width = beam.num_beams // beam.num_beam_groups
    first = model.read(model.start[image], torch.tensor(BOS))
    running = [[(0.0, [BOS], first)] for _ in range(beam.num_beam_groups)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(beam.num_beam_groups)]
    is_open = [True] * beam.num_beam_groups
    for length in range(1, beam.max_tokens):
        taken: list[int] = []
        for group in range(beam.num_beam_groups):
            options = []
            for score, caption, state in running[group]:
                for word, gain in enumerate(model.logits(state).log_softmax(-1).tolist()):
                    cost = gain - beam.diversity_penalty * taken.count(word)
                    if not forbidden(caption, word, beam):
                        options.append((score + cost, [*caption, word], state))
            options = sorted(options, key=lambda option: -option[0])[: 2 * width]
            for score, caption, _ in options[:width]:
                if is_open[group] and (caption[-1] == EOS or len(caption) == beam.max_tokens):
                    finished[group].append((score / length**beam.length_penalty, caption))
            finished[group] = sorted(finished[group], reverse=True)[:width]
            running[group] = [
                (score, caption, model.read(state, torch.tensor(caption[-1])))
                for score, caption, state in options
                if caption[-1] != EOS
            ][:width]
            taken += [caption[-1] for _, caption, _ in running[group]]
            if len(finished[group]) == width:
                hope = running[group][0][0] / length**beam.length_penalty
                if beam.early_stopping is True or hope <= finished[group][-1][0]:
                    is_open[group] = False
        if not any(is_open):
            break
    return sorted((entry for group in finished for entry in group), reverse=True)


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize(("num_beams", "groups"), [(4, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize(
    "change",
    [{}, {"no_repeat_ngram_size": 2, "length_penalty": 0.0, "min_tokens": 4, "banned": ["4", "5 6"]}],
)
def test_groups_equal_a_search_in_plain_words(
    early_stopping: bool, num_beams: int, groups: int, change: dict[str, Any]
) -> None:
    options = {"num_beams": num_beams, "num_beam_groups": groups, "early_stopping": early_stopping}
    beam = build_decoding(DIVERSE | options | {"num_return_sequences": num_beams} | change)
    assert isinstance(beam, Beam)
    model = Recurrent(images=4, vocabulary=12, seed=num_beams, eos_bonus=1.0)
    decoded = run(beam, model.step(), ids(4))
    assert_well_formed(decoded, beam, 4, BOS, EOS)
    for image, found in enumerate(captions(decoded)):
        expected = groups_in_plain_words(beam, model, image)
        distinct = [entry for i, entry in enumerate(expected) if entry[1] not in [c for _, c in expected[:i]]]
        assert found[: len(distinct)] == [caption for _, caption in distinct]
        assert decoded.scores[image, : len(distinct)].tolist() == pytest.approx(
            [score for score, _ in distinct], abs=1e-5
        )
        again = [caption for caption in found[len(distinct) :] if caption not in found[: len(distinct)]]
        assert not again  # what follows repeats what came before


def test_a_higher_diversity_penalty_makes_the_captions_of_groups_differ_more() -> None:
    model = Recurrent(images=20, vocabulary=30, seed=0, eos_bonus=-30.0)
    shared = []
    for penalty in (0.01, 0.5, 2.0, 20.0):
        change = {"num_beams": 3, "num_return_sequences": 3, "diversity_penalty": penalty}
        tokens = run(build_decoding(DIVERSE | change), model.step(), ids(20)).tokens[..., 1:]  # (B, 3, T)
        pairs = [(tokens[:, i] == tokens[:, j]).float().mean() for i, j in ((0, 1), (0, 2), (1, 2))]
        shared.append(float(sum(pairs)) / 3)
    assert shared == sorted(shared, reverse=True)
    assert shared[0] > 0.3
    assert shared[-1] == 0  # no word at the same place


# Behaviour


@pytest.mark.parametrize("early_stopping", [True, False])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_one_beam_is_greedy(early_stopping: bool, length_penalty: float) -> None:
    model = Recurrent(images=5, vocabulary=9, seed=0, eos_bonus=1.0)
    greedy = run(build_decoding(GREEDY), model.step(), ids(5))
    one = {"num_beams": 1, "early_stopping": early_stopping, "length_penalty": length_penalty}
    beam = run(build_decoding(BEAM | one), model.step(), ids(5))
    assert torch.equal(beam.tokens, greedy.tokens)
    assert torch.equal(beam.lengths, greedy.lengths)
    assert len(greedy.lengths.unique()) > 1
    torch.testing.assert_close(beam.scores, greedy.scores / (greedy.lengths - 1) ** length_penalty)


def test_beam_search_asks_for_one_row_per_image_first_and_keeps_to_each_images_rows() -> None:
    model = Recurrent(images=3, vocabulary=9, seed=0)
    step = model.step()
    run(build_decoding(BEAM), step, ids(3))
    (first, no_parents), (second, parents), *later = step.calls
    assert first.tolist() == [BOS] * 3
    assert no_parents is None
    assert len(second) == 9
    assert parents is not None
    assert parents.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert len(step.calls) == 7  # the last word is never read
    for newest, parents in later:
        assert newest.dtype == torch.int64
        assert parents is not None
        assert (parents // 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_never_stopping_early_waits_for_a_better_caption_where_the_penalty_favours_short_ones() -> None:
    follows = torch.full((5, 5), 0.01)  # [newest, next]; the likely caption is BOS 2 3 EOS
    follows[BOS, 2], follows[2, 3], follows[3, EOS] = 0.9, 0.95, 0.98
    follows[[BOS, 2], EOS] = 0.05  # two captions of lower score end before it
    change = {"num_beams": 2, "length_penalty": -2.0, "early_stopping": "never", "max_tokens": 30}
    decoded = run(
        build_decoding(BEAM | change), lambda newest, parents, images: follows.log()[newest], ids(1)
    )
    assert decoded.tokens[0, 0, :4].tolist() == [BOS, 2, 3, EOS]


@pytest.mark.parametrize("options", [BEAM | {"num_beams": 5}, DIVERSE])
def test_a_vocabulary_smaller_than_the_beam_gives_no_empty_hypothesis(options: dict[str, Any]) -> None:
    model = Recurrent(images=2, vocabulary=2, seed=0)
    beam = build_decoding(options | {"early_stopping": True})
    decoded = run(beam, model.step(), ids(2))
    assert_well_formed(decoded, beam, 2, BOS, EOS)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
@pytest.mark.parametrize("options", [BEAM, DIVERSE, BEAM | {"repetition_penalty": 1.3, "prefix": "4 5"}])
def test_log_probabilities_of_the_tokens_sum_to_the_score(
    options: dict[str, Any], length_penalty: float
) -> None:
    model = Recurrent(images=6, vocabulary=9, seed=5, eos_bonus=1.5)
    beam = build_decoding(options | {"num_return_sequences": 3, "length_penalty": length_penalty})
    decoded = run(beam, model.step(), ids(6))
    prompt = 1 + len(options["prefix"].split())
    sums = decoded.token_log_probs.sum(dim=-1) / (decoded.lengths - prompt) ** length_penalty
    torch.testing.assert_close(sums, decoded.scores)
    assert (decoded.token_log_probs[..., :prompt] == 0).all()
    after = torch.arange(decoded.tokens.shape[-1]) >= decoded.lengths[..., None]
    assert (decoded.token_log_probs[after] == 0).all()


@pytest.mark.parametrize("options", [BEAM | {"num_beams": 6}, DIVERSE | {"diversity_penalty": 0.05}])
def test_returned_captions_are_distinct_first_and_the_best_first(options: dict[str, Any]) -> None:
    model = Recurrent(images=8, vocabulary=9, seed=5, eos_bonus=1.5)
    decoded = run(build_decoding(options | {"num_return_sequences": 6}), model.step(), ids(8))
    first = run(build_decoding(options), model.step(), ids(8))
    assert captions(first) == [rows[:1] for rows in captions(decoded)]
    repeated = False
    for rows, scores in zip(captions(decoded), decoded.scores.tolist(), strict=True):
        distinct = len({tuple(caption) for caption in rows})
        repeated |= distinct < 6
        assert len({tuple(caption) for caption in rows[:distinct]}) == distinct
        assert scores[:distinct] == sorted(scores[:distinct], reverse=True)
        assert all(math.isfinite(score) for score in scores)
    assert repeated == (options["num_beam_groups"] > 1)
