"""Each rule alone against transformers' logits processor for it, and the selection of the largest against topk.

R rows, t tokens, V words.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from efficap.decoding.rules import Rules
from efficap.decoding.top import COLUMNS, top_words

EOS, VOCABULARY = 11, 12
LENGTHS = [1, 2, 3, 9]


def rules(**changes: Any) -> Rules:
    none: dict[str, Any] = {
        "prompt": [0],
        "eos_id": EOS,
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "banned": [],
        "device": torch.device("cpu"),
    }
    return Rules(**none | changes)


def assert_equal(ours: Rules, theirs: LogitsProcessor, length: int) -> None:
    """On scores of both signs, over 200 rows of few different words; nothing is written in place."""
    changed = False
    for scores in (torch.randn(200, VOCABULARY), torch.randn(200, VOCABULARY).log_softmax(-1)):
        tokens = torch.randint(0, 5, (200, length))
        before = scores.clone()
        actual, expected = ours.apply(scores, tokens), theirs(tokens, scores.clone())
        assert torch.equal(actual, expected)
        assert torch.equal(scores, before)
        changed |= not torch.equal(actual, before)
    assert changed or length < 3


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(length: int, penalty: float) -> None:
    assert_equal(rules(repetition_penalty=penalty), RepetitionPenaltyLogitsProcessor(penalty), length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_blocked_ngrams_equal_transformers(length: int, size: int) -> None:
    assert_equal(
        rules(no_repeat_ngram_size=size), NoRepeatNGramLogitsProcessor(size), length + (6 if size == 3 else 0)
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_banned_sequences_equal_transformers(length: int) -> None:
    banned = [[1], [7], [2, 3], [2, 4], [3, 3, 9], [4, 10], [0, 1, 2, 3], [1, 2, 3, 4, 6]]
    assert_equal(rules(banned=banned), NoBadWordsLogitsProcessor(banned, eos_token_id=EOS), length)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("min_tokens", [0, 4, 10])
def test_the_shortest_length_equals_transformers(length: int, min_tokens: int) -> None:
    scores, tokens = torch.randn(5, VOCABULARY), torch.zeros(5, length, dtype=torch.int64)
    expected = MinLengthLogitsProcessor(min_tokens, EOS)(tokens, scores.clone())
    assert torch.equal(rules(min_tokens=min_tokens).apply(scores, tokens), expected)


def test_where_no_rule_says_anything_nothing_is_copied() -> None:
    scores = torch.randn(2, VOCABULARY)
    assert rules().apply(scores, torch.zeros(2, 3, dtype=torch.int64)) is scores


def test_eos_repeats_nothing_where_bos_has_its_id() -> None:
    tokens = torch.tensor([[EOS, 3, 4]])
    scores = rules(prompt=[EOS], no_repeat_ngram_size=1).apply(torch.zeros(1, VOCABULARY), tokens)
    assert scores.isinf().nonzero()[:, 1].tolist() == [3, 4]


def test_exempt_words_may_repeat_a_sequence_but_stay_banned() -> None:
    tokens = torch.tensor([[0, 3, 4], [0, 3, 4]])
    one = rules(no_repeat_ngram_size=1, banned=[[4]])
    scores = one.apply(torch.zeros(2, VOCABULARY), tokens, exempt=torch.tensor([[3, 4], [-1, -1]]))
    assert scores.isinf().nonzero().tolist() == [[0, 0], [0, 4], [1, 0], [1, 3], [1, 4]]


def test_a_banned_sequence_is_found_anywhere_in_ids() -> None:
    some = rules(banned=[[2, 3], [7]])
    assert some.bans_part_of([1, 2, 3, 4])
    assert some.bans_part_of([7])
    assert not some.bans_part_of([3, 2])
    assert not some.bans_part_of([])


# The largest


@pytest.mark.parametrize("vocabulary", [1, 7, 511, 512, 1023, 1024, 1025, 1536, 5000, 50257])
@pytest.mark.parametrize("count", [1, 3, 10, 128, 129])
def test_the_largest_are_those_of_topk(vocabulary: int, count: int) -> None:
    values = torch.randn(6, vocabulary)
    values[1] = values[1].sort().values  # the largest in what is left over by the fold
    values[2] = values[2].sort(descending=True).values
    values[3, ::COLUMNS] += 10  # all in one column
    values[4] = values[4].masked_fill(torch.rand(vocabulary) < 0.9, -torch.inf)
    best, index = top_words(values, count)
    expected = values.topk(min(count, vocabulary)).values
    assert torch.equal(best, expected)
    assert torch.equal(values.gather(1, index), expected)
    for row in index[:4]:  # each word once
        assert len(row.unique()) == len(row)


def test_equal_values_are_all_different_words() -> None:
    best, index = top_words(torch.zeros(2, 3000), 20)
    assert (best == 0).all()
    assert all(len(row.unique()) == 20 for row in index)


def test_nan_is_among_the_largest() -> None:
    values = torch.randn(3, 3000)
    values[1, 1700] = torch.nan
    best, index = top_words(values, 4)
    assert best[1].isnan().sum() == 1
    assert int(index[1, 0]) == 1700
    assert not _any_nan(best[[0, 2]])


def _any_nan(values: Tensor) -> bool:
    return bool(values.isnan().any())
