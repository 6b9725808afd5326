"""Required words: every caption has them, whatever the model thinks; and the search for them finds good captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_beam import numbers, ranked_captions
from torch import Tensor
from toys import (
    BEAM,
    BOS,
    CONSTRAINED,
    EOS,
    GPT2Pair,
    Numbers,
    Recurrent,
    assert_well_formed,
    captions,
    constant_step,
    contains,
    ids,
    run,
)

from efficap.decoding import Constrained, build_decoding
from efficap.decoding.constraints import _share_out
from efficap.decoding.phrases import Phrases
from efficap.errors import InputError


def constrained(*required: str, **changes: Any) -> Constrained:
    decoding = build_decoding(CONSTRAINED | changes | {"required": list(required)})
    assert isinstance(decoding, Constrained)
    return decoding


def never_called(newest: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
    raise AssertionError("the model was asked")


def hating(vocabulary: int, *words: int) -> Tensor:
    logits = torch.linspace(0, 1, vocabulary)
    logits[list(words)] = -50.0
    return logits


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize(
    ("required", "limits"),
    [
        (["3"], {}),
        (["3 2"], {"min_tokens": 4}),
        (["2 3", "3 2"], {}),
        (["2", "0"], {"banned": ["3 3", "1 1"]}),
        (["2 2"], {"prefix": "2 3", "max_tokens": 7}),
        (["2 0"], {"prefix": "3 2", "max_tokens": 6}),
        (["3"], {"no_repeat_ngram_size": 2, "max_tokens": 6}),
    ],
)
def test_a_beam_too_wide_to_prune_finds_the_best_of_the_captions_with_the_words(
    early_stopping: Any, length_penalty: float, required: list[str], limits: dict[str, Any]
) -> None:
    change = {"max_tokens": 6, "num_beams": 200, "length_penalty": length_penalty, **limits}
    beam = constrained(*required, **change, early_stopping=early_stopping, num_return_sequences=4)
    model = Recurrent(images=3, vocabulary=4, seed=3)
    decoded = run(beam, model.step(), ids(3))
    room = beam.max_tokens - 1  # all is said where EOS could still follow
    for image, found in enumerate(captions(decoded)):
        every = ranked_captions(model, image, beam)
        best = [x for x in every if all(contains(x[1][:room], part) for part in numbers(required))][:4]
        assert found == [caption for _, caption in best]
        assert decoded.scores[image].tolist() == pytest.approx([score for score, _ in best], abs=1e-5)


def test_nothing_required_is_plain_beam_search() -> None:
    for change in ({}, {"num_beams": 6, "num_return_sequences": 6}, {"num_beam_groups": 3, "num_beams": 6}):
        if "num_beam_groups" in change:
            change["diversity_penalty"] = 1.0
        model = Recurrent(images=6, vocabulary=9, seed=5, eos_bonus=1.5)
        plain = run(build_decoding(BEAM | change), model.step(), ids(6))
        none = run(
            build_decoding(BEAM | change | {"method": "constrained", "required": []}), model.step(), ids(6)
        )
        assert torch.equal(plain.tokens, none.tokens)
        assert torch.equal(plain.scores, none.scores)
        assert torch.equal(plain.token_log_probs, none.token_log_probs)


@pytest.mark.parametrize("num_beams", [1, 2, 8])
@pytest.mark.parametrize("max_tokens", [6, 7, 12])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_a_model_that_hates_the_words_says_them_and_ends(
    num_beams: int, max_tokens: int, early_stopping: Any
) -> None:
    beam = constrained(
        "5 6",
        "7 5",
        num_beams=num_beams,
        max_tokens=max_tokens,
        early_stopping=early_stopping,
        length_penalty=0.0,
    )
    logits = hating(12, 5, 6, 7)
    logits[EOS] = 40.0
    [[caption]] = captions(run(beam, constant_step(logits), ids(1)))
    assert contains(caption, [5, 6])
    assert contains(caption, [7, 5])
    assert caption[-1] == EOS
    assert len(caption) <= (5 if num_beams == 8 else 6)  # 7 5 6 says both


def test_a_phrase_in_the_prefix_or_across_its_end_counts() -> None:
    logits = hating(12, 5, 6, 7)
    beam = constrained("5", "6 7", prefix="5 6", max_tokens=5)
    [[caption]] = captions(run(beam, constant_step(logits), ids(1)))
    assert caption[:4] == [BOS, 5, 6, 7]


@pytest.mark.parametrize(
    "required", [["12", "9 4"], ["9 12", "9 4"]]
)  # also where both need the same word next
def test_more_captions_of_an_image_are_distinct_and_say_the_words(required: list[str]) -> None:
    model = Recurrent(images=4, vocabulary=20, seed=1, eos_bonus=2.0)
    model.bias[[4, 9, 12]] += 3.0
    beam = constrained(*required, num_return_sequences=6, max_tokens=10)
    for rows in captions(run(beam, model.step(), ids(4))):
        assert len({tuple(caption) for caption in rows}) == 6
        assert all(contains(caption, part) for caption in rows for part in numbers(required))


def test_a_word_is_said_where_the_model_likes_it_best() -> None:
    model = Recurrent(images=30, vocabulary=20, seed=2, eos_bonus=2.0)
    wide, narrow, greedy = (
        run(constrained("12", num_beams=beams), model.step(), ids(30)).scores.mean() for beams in (64, 8, 1)
    )
    assert wide >= narrow > greedy
    assert wide - narrow < 0.1 * (wide - greedy)


def test_banned_words_do_not_lead_into_a_dead_end() -> None:
    logits = hating(12, 6)
    logits[5] = 40.0  # every caption would be 5 5 5 …
    beam = constrained("6", banned=["5 6"], num_beams=2)
    [[caption]] = captions(run(beam, constant_step(logits), ids(1)))
    assert contains(caption, [6])
    assert not contains(caption, [5, 6])


def test_a_word_that_can_only_come_first_comes_first() -> None:
    banned = [f"{word} 6" for word in (0, 2, 3, 4, 5)]
    beam = constrained("6", "5", banned=banned, num_beams=1, max_tokens=9)
    [[caption]] = captions(run(beam, constant_step(hating(7, 6)), ids(1), bos_id=EOS))
    assert caption[:2] == [EOS, 6]
    assert 5 in caption


def test_required_words_may_repeat_a_sequence_and_others_may_not() -> None:
    logits = hating(12, 6)
    logits[5], logits[7] = 20.0, 20.0
    beam = constrained("5 6", no_repeat_ngram_size=1, prefix="5 7", num_beams=4)
    [[caption]] = captions(run(beam, constant_step(logits), ids(1)))
    assert contains(caption, [5, 6])
    others = [word for word in caption if word != 5]
    assert len(set(others)) == len(others)


class TwoWays(Numbers):
    """Anything is [8, 9] inside a caption, and [10] at its beginning."""

    def usual_spellings(self, phrase: str) -> list[list[int]]:
        return [[8, 9], [EOS, 10]]


def in_two_ways(beam: Constrained, step: Any) -> list[int]:
    decoded = beam.decode(step, ids(1), bos_id=EOS, eos_id=EOS, device="cpu", vocabulary=TwoWays())
    return captions(decoded)[0][0]


def test_a_spelling_for_the_beginning_counts_only_there() -> None:
    logits = hating(12, 8, 9)
    assert in_two_ways(constrained("x", max_tokens=3), constant_step(logits))[:2] == [EOS, 10]
    logits[10] = 9.0
    assert contains(in_two_ways(constrained("x", max_tokens=9, prefix="3"), constant_step(logits)), [8, 9])
    logits[10] = -300.0
    assert contains(in_two_ways(constrained("x", max_tokens=9), constant_step(logits)), [8, 9])
    with pytest.raises(InputError, match="takes 5 tokens"):
        in_two_ways(constrained("x", max_tokens=4, prefix="3"), never_called)


def test_bos_is_no_progress() -> None:
    phrases = Phrases([[[8, 9], [EOS, 10, 11]]], [], bos_id=EOS, device=torch.device("cpu"))
    for tokens, progress in (
        ([EOS], 0),
        ([EOS, 10], 1),
        ([EOS, 10, 11], 2),
        ([EOS, 8], 1),
        ([EOS, 3, 10], 0),
    ):
        rows = torch.tensor([tokens])
        assert phrases.progress(phrases.begun(rows), phrases.said(rows)).tolist() == [progress]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_the_model_all_is_said_and_nothing_banned(data: st.DataObject) -> None:
    word = st.integers(2, 5)  # few words, so that phrases overlap and run into what is banned
    phrase = st.lists(word, min_size=1, max_size=3).map(lambda words: " ".join(map(str, words)))
    required = data.draw(st.lists(phrase, min_size=1, max_size=3))
    size = data.draw(st.sampled_from([0, 0, 2, 3]))
    options = {
        "max_tokens": data.draw(st.integers(4, 14)),
        "min_tokens": data.draw(st.integers(0, 2)),
        "num_beams": data.draw(st.integers(1, 6)),
        "early_stopping": data.draw(st.sampled_from([True, False, "never"])),
        "length_penalty": data.draw(st.sampled_from([-1.0, 0.0, 1.0])),
        "banned": data.draw(st.lists(st.sampled_from(["2 3", "5 5", "4 2 5", "3 5", "4 4"]), max_size=3)),
        "no_repeat_ngram_size": size,
        "prefix": data.draw(st.lists(word, max_size=2).map(lambda words: " ".join(map(str, words)))),
    }
    bos_id = data.draw(st.sampled_from([BOS, EOS]))
    beam = constrained(*required, **options)
    model = Recurrent(
        3, 20, data.draw(st.integers(0, 99)), eos_bonus=data.draw(st.sampled_from([-9.0, 0.0, 9.0]))
    )
    model.bias[2:6] = data.draw(st.sampled_from([-20.0, 0.0, 5.0]))
    try:
        decoded = run(beam, model.step(), ids(3), bos_id=bos_id)
    except InputError as error:
        assert str(error).startswith(("decoding.required=", "decoding.prefix="))  # noqa: PT017
        return
    assert_well_formed(decoded, beam, 3, bos_id, EOS)
    for [caption] in captions(decoded):
        assert all(contains(caption, part) for part in numbers(required))
        assert not any(contains(caption, part) for part in numbers(beam.banned))
        grams = [tuple(caption[i : i + size]) for i in range(len(caption) - size + 1)] if size else []
        repeated = {gram for i, gram in enumerate(grams) if gram in grams[:i]}
        own = len(beam.prefix.split()) + 1
        assert all(
            any(gram[-1] in part for part in numbers(required)) or contains(caption[:own], list(gram))
            for gram in repeated
        )


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_beams_are_shared_out_in_rounds_from_the_fullest_bank_down(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    banks = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    scores = data.draw(st.permutations([-float(i) if i < 10 else -torch.inf for i in range(count)]))
    order = _share_out(torch.tensor([scores]), torch.tensor([banks]), 3)[0].tolist()
    assert sorted(order) == list(range(count))
    left = {
        bank: sorted((s, i) for i, (s, b) in enumerate(zip(scores, banks, strict=True)) if b == bank)
        for bank in range(4)
    }
    expected = []
    while any(left.values()):
        for bank in (3, 2, 1, 0):
            if left[bank]:
                score, place = left[bank].pop()
                if score > -torch.inf:
                    expected.append(place)
    assert order[: len(expected)] == expected


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_progress_is_a_function_of_the_tokens(data: st.DataObject) -> None:
    words = st.lists(st.integers(2, 4), min_size=1, max_size=4)
    spellings = data.draw(st.lists(words, min_size=1, max_size=3))
    phrases = Phrases([[s] for s in spellings], [], bos_id=BOS, device=torch.device("cpu"))
    tokens = [BOS, *data.draw(st.lists(st.integers(2, 4), min_size=1, max_size=8))]
    rows = torch.tensor([tokens])
    said, begun = phrases.said(rows)[0].tolist(), phrases.begun(rows)[0, :, 0].tolist()
    for spelling, is_said, length in zip(spellings, said, begun, strict=True):
        assert is_said == contains(tokens, spelling)
        ends = [
            k
            for k in range(len(spelling) + 1)
            if k <= len(tokens) and tokens[len(tokens) - k :] == spelling[:k]
        ]
        assert length == max(ends)
    recent, latest, after = phrases.extend(rows[:, :-1], phrases.said(rows[:, :-1]), rows[:, -1])
    assert torch.equal(after, phrases.said(rows))
    assert torch.equal(latest, phrases.begun(rows))
    plan = int(phrases.outlook(recent, latest, after))
    assert plan <= sum(len(s) for s, done in zip(spellings, said, strict=True) if not done)


def test_the_real_step_says_the_words() -> None:
    pair = GPT2Pair(0, eos_id=BOS, images=6)
    beam = constrained("12", "9 4", num_beams=8, max_tokens=12)
    decoded = run(beam, pair.step(12), ids(6), eos_id=BOS)
    assert_well_formed(decoded, beam, 6, BOS, BOS)
    assert all(contains(row, [12]) and contains(row, [9, 4]) for [row] in captions(decoded))


@pytest.mark.parametrize(
    ("required", "changes", "message"),
    [
        (
            ["3 4", "5"],
            {"max_tokens": 4},
            r"required=\['3 4', '5'\] must leave room in decoding.max_tokens=4: .* takes 5",
        ),
        (["3"], {"max_tokens": 4, "prefix": "4 5"}, "takes 5 tokens; raise max_tokens or require less"),
        (["3 4 5"], {"banned": ["4 5"]}, "required='3 4 5' must not be banned; take it out of"),
        (["3"], {"banned": ["2 3"], "prefix": "2"}, "list them in another order or ban less"),
        (["2", "3"], {"banned": ["2 3"]}, "list them in another order or ban less"),
        (["1"], {}, "must be words; the end of a text is none"),
    ],
)
def test_what_cannot_be_met_is_refused_before_any_step(
    required: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(constrained(*required, **changes), never_called, ids(1))


def test_the_shortest_room_is_enough() -> None:
    beam = constrained("3 4", "5", max_tokens=5, num_return_sequences=6)
    decoded = run(beam, constant_step(hating(12, 3, 4, 5)), ids(1))
    assert decoded.tokens.shape[1:] == (6, 5)
    assert all(contains(row, [3, 4]) and contains(row, [5]) for row in captions(decoded)[0])


@pytest.mark.parametrize("required", ["dog", [""], [3], 5])
def test_required_must_be_a_list_of_words(required: Any) -> None:
    with pytest.raises(InputError, match=r"decoding.required=.* must be a list of words or phrases"):
        build_decoding(CONSTRAINED | {"required": required})


def test_groups_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_beam_groups=3 must be 1 with decoding.required"):
        constrained("3", num_beam_groups=3, diversity_penalty=1.0)
