"""What all decoding methods promise, their settings, and sampling against exact distributions.

B images, R rows, T tokens, V words, D width.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
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
    assert_well_formed,
    captions,
    constant_step,
    ids,
    run,
)
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from efficap.decoding import Decoding, build_decoding
from efficap.decoding.sampling import uniform_numbers
from efficap.errors import InputError

CONF = Path(__file__).parents[2] / "conf"
ALL = [GREEDY, BEAM, DIVERSE, CONSTRAINED, NUCLEUS]


def greedy_search(**changes: Any) -> Decoding:
    return build_decoding(GREEDY | changes)


# Greedy


@pytest.mark.parametrize("eos_id", [BOS, 7])
@pytest.mark.parametrize("min_tokens", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_transformers(eos_id: int, min_tokens: int, seed: int) -> None:
    pair = GPT2Pair(seed, eos_id=eos_id)
    greedy = greedy_search(max_tokens=10, min_tokens=min_tokens)
    decoded = run(greedy, pair.step(10), ids(4), eos_id=eos_id)
    expected = pair.generate(greedy, [BOS], num_beams=1)
    assert torch.equal(decoded.tokens[:, 0], expected.sequences)


def test_greedy_scores_are_sums_of_log_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    decoded = run(greedy_search(max_tokens=4, min_tokens=0), constant_step(logits), ids(2))
    expected = 3 * logits.log_softmax(-1)[2]
    assert decoded.tokens[:, 0].tolist() == [[BOS, 2, 2, 2]] * 2
    torch.testing.assert_close(decoded.scores[:, 0], expected.expand(2))


# Nucleus sampling


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, None, 0.8, 0.0),
        (0.6, None, 1.0, 0.0),
        (1.7, 4, 0.75, 0.0),
        (1.0, 3, 1.0, 0.0),
        (1.0, None, 1.0, 0.3),
        (1.7, 6, 0.9, 0.4),
        (0.8, None, 1.0, 1.0),
    ],
)
def test_nucleus_frequencies_agree_with_the_exact_distribution(
    temperature: float, top_k: int | None, top_p: float, min_p: float
) -> None:
    logits = torch.tensor([[0.3, -0.4, 1.2, 2.0, 0.9, -1.0, 1.6]])
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    scores = MinPLogitsWarper(min_p)(None, TopPLogitsWarper(top_p)(None, scores))
    exact = scores.softmax(-1)[0]  # (V,)
    change = {"max_tokens": 2, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    nucleus = build_decoding(NUCLEUS | change)
    draws = 20_000
    decoded = run(nucleus, constant_step(logits), ids(draws))
    counts = decoded.tokens[:, 0, 1].bincount(minlength=7)
    inside = exact > 0
    assert counts[~inside].sum() == 0
    chi_square = ((counts - draws * exact) ** 2 / (draws * exact))[inside].sum()
    assert chi_square < 22.5  # the 0.999 quantile for 6 degrees of freedom


def test_a_tiny_top_p_is_greedy() -> None:
    model = Recurrent(images=6, vocabulary=9, seed=1, eos_bonus=1.0)
    nucleus = run(build_decoding(NUCLEUS | {"top_p": 1e-6}), model.step(), ids(6))
    greedy = run(build_decoding(GREEDY), model.step(), ids(6))
    assert torch.equal(nucleus.tokens, greedy.tokens)
    torch.testing.assert_close(nucleus.scores, greedy.scores)


def test_top_k_of_one_and_the_lowest_temperature_are_greedy() -> None:
    model = Recurrent(images=6, vocabulary=9, seed=2, eos_bonus=1.0)
    greedy = run(build_decoding(GREEDY), model.step(), ids(6))
    for change in ({"top_k": 1, "top_p": 1.0}, {"temperature": 0.01, "top_p": 1.0}):
        nucleus = run(build_decoding(NUCLEUS | change), model.step(), ids(6))
        assert torch.equal(nucleus.tokens, greedy.tokens)


def test_another_seed_gives_other_captions() -> None:
    model = Recurrent(images=6, vocabulary=9, seed=1)
    first, second, again = (
        run(build_decoding(NUCLEUS | {"seed": seed, "top_p": 1.0}), model.step(), ids(6))
        for seed in (0, 1, 0)
    )
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, second.tokens)


def test_random_numbers_depend_on_seed_and_key_alone_and_fill_the_unit_interval() -> None:
    numbers = uniform_numbers(0, ids(5000), 4)
    assert torch.equal(numbers[7:8], uniform_numbers(0, ["image-7"], 4))
    assert torch.equal(numbers[:, :2], uniform_numbers(0, ids(5000), 2))
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    tenths = (numbers * 10).long().flatten().bincount(minlength=10)
    assert ((tenths - 2000) ** 2 / 2000).sum() < 27.9  # the 0.999 quantile for 9 degrees of freedom
    assert numbers.T.corrcoef().fill_diagonal_(0).abs().max() < 0.05


def test_successive_words_are_drawn_independently() -> None:
    logits = torch.tensor([0.3, -torch.inf, 1.2, 0.6])
    nucleus = build_decoding(NUCLEUS | {"top_p": 1.0, "max_tokens": 3})
    draws = 20_000
    words = run(nucleus, constant_step(logits), ids(draws)).tokens[:, 0, 1:]  # (B, 2)
    pairs = (words[:, 0] * 4 + words[:, 1]).bincount(minlength=16)
    exact = torch.outer(logits.softmax(-1), logits.softmax(-1)).flatten()
    inside = exact > 0
    assert pairs[~inside].sum() == 0
    assert ((pairs - draws * exact) ** 2 / (draws * exact))[inside].sum() < 26.1  # 0.999, 8 degrees


def draws_at(
    extreme: float, logits: torch.Tensor, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> torch.Tensor:
    """The first words (B,) where every random number is `extreme`, and EOS must not come yet."""
    monkeypatch.setattr(
        "efficap.decoding.sampling.uniform_numbers",
        lambda seed, keys, count: torch.full((len(keys), count), extreme),
    )
    nucleus = build_decoding(NUCLEUS | {"top_p": top_p, "max_tokens": 3, "min_tokens": 2})
    return run(nucleus, lambda newest, parents, images: logits, ids(len(logits))).tokens[:, 0, 1]


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_extreme_random_numbers_stay_inside_the_nucleus(
    extreme: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(
        2000, 50, generator=torch.Generator().manual_seed(0)
    )  # sums round to either side of 1
    words = draws_at(extreme, logits, 0.5, monkeypatch)
    logits[:, EOS] = -torch.inf  # as min_tokens forbids it
    kept = TopPLogitsWarper(0.5)(None, logits)
    expected = kept.argmax(-1) if extreme == 0 else kept.masked_fill(kept.isinf(), torch.inf).argmin(-1)
    assert (words != EOS).all()
    assert (words == expected).float().mean() > 0.99  # both sides round


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_extreme_random_numbers_never_choose_what_cannot_come(
    extreme: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    impossible = torch.rand(2000, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    impossible[:, [0, 49]] = True
    words = draws_at(extreme, logits.masked_fill(impossible, -torch.inf), 1.0, monkeypatch)
    impossible[:, EOS] = True
    assert not impossible.gather(1, words[:, None]).any()
    ends = (~impossible).long()
    expected = ends.argmax(-1) if extreme == 0 else 49 - ends.flip(-1).argmax(-1)
    assert (words == expected).float().mean() > 0.9  # a last word of less than 2**-24 is passed over


def test_image_ids_may_be_any_text() -> None:
    odd = ["", "a b", "ü/é", "\ud800", "0 a"]
    assert len(uniform_numbers(0, odd, 2).unique()) == 10


def test_the_first_sample_does_not_depend_on_how_many_there_are() -> None:
    model = Recurrent(images=6, vocabulary=9, seed=5, eos_bonus=1.5)
    one, five = (
        run(build_decoding(NUCLEUS | {"top_p": 1.0, "num_return_sequences": n}), model.step(), ids(6))
        for n in (1, 5)
    )
    assert [rows[:1] for rows in captions(five)] == captions(one)
    assert any(len({tuple(caption) for caption in rows}) > 3 for rows in captions(five))


def test_samples_of_an_image_are_independent_draws() -> None:
    logits = torch.tensor([0.3, -torch.inf, 1.2, 0.6])
    nucleus = build_decoding(NUCLEUS | {"top_p": 1.0, "max_tokens": 2, "num_return_sequences": 2})
    draws = 20_000
    words = run(nucleus, constant_step(logits), ids(draws)).tokens[..., 1]  # (B, 2)
    pairs = (words[:, 0] * 4 + words[:, 1]).bincount(minlength=16)
    exact = torch.outer(logits.softmax(-1), logits.softmax(-1)).flatten()
    inside = exact > 0
    assert ((pairs - draws * exact) ** 2 / (draws * exact))[inside].sum() < 26.1  # 0.999, 8 degrees


# All methods


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        BEAM,
        BEAM | {"early_stopping": True, "num_return_sequences": 3},
        BEAM
        | {"early_stopping": "never", "prefix": "4 5", "no_repeat_ngram_size": 2, "banned": ["8", "6 7"]},
        DIVERSE | {"num_return_sequences": 3},
        CONSTRAINED | {"length_penalty": -2.0},
        CONSTRAINED | {"length_penalty": -1.0, "banned": ["5 5"], "num_return_sequences": 2, "prefix": "8"},
        NUCLEUS | {"num_return_sequences": 4, "top_p": 1.0, "repetition_penalty": 1.2},
    ],
)
def test_a_caption_does_not_depend_on_its_neighbours_nor_on_when_they_leave(options: dict[str, Any]) -> None:
    decoding = build_decoding({**options, "max_tokens": max(12, options["max_tokens"])})
    lengths, left = set(), False
    for seed in range(3):
        pair = GPT2Pair(seed, eos_id=EOS, images=24, eos_bonus=2.0 * seed)
        step = pair.step(decoding.max_tokens)
        together = run(decoding, step, ids(24))
        lengths |= set(together.lengths[:, 0].tolist())
        left |= step.rows[-1] < max(step.rows)
        for rows in (*([row] for row in range(0, 24, 4)), [5, 2], [4, 1, 0, 23, 7]):
            step_apart = pair.step(decoding.max_tokens, rows)
            apart = run(decoding, step_apart, [f"image-{row}" for row in rows])
            assert captions(apart) == [captions(together)[row] for row in rows]
            torch.testing.assert_close(apart.scores, together.scores[rows])
            assert torch.equal(apart.ended, together.ended[rows])
    assert len(lengths) > 2
    assert left


@pytest.mark.parametrize("options", [GREEDY, NUCLEUS | {"num_return_sequences": 3, "prefix": "3 4"}])
def test_log_probabilities_are_the_models_own_and_sum_to_the_score(options: dict[str, Any]) -> None:
    model = Recurrent(images=6, vocabulary=9, seed=5, eos_bonus=1.5)
    decoded = run(build_decoding(options | {"repetition_penalty": 1.3}), model.step(), ids(6))
    torch.testing.assert_close(decoded.token_log_probs.sum(dim=-1), decoded.scores)
    prompt = 1 + len(options["prefix"].split())
    for image, rows in enumerate(captions(decoded)):
        for sample, caption in enumerate(rows):
            state, expected = model.start[image], []
            for newest, word in itertools.pairwise(caption):
                state = model.read(state, torch.tensor(newest))
                expected.append(float(model.logits(state).log_softmax(-1)[word]))
            found = decoded.token_log_probs[image, sample].tolist()
            assert found[:prompt] == [0.0] * prompt
            assert found[prompt : len(caption)] == pytest.approx(expected[prompt - 1 :], abs=1e-5)
            assert not any(found[len(caption) :])
    assert not decoded.ended.all()
    assert decoded.ended.any()


@pytest.mark.parametrize("options", ALL)
def test_bos_that_is_also_eos_does_not_end_the_caption(options: dict[str, Any]) -> None:
    model = Recurrent(images=6, vocabulary=9, seed=5)
    decoding = build_decoding(options)
    decoded = run(decoding, model.step(), ids(6), bos_id=4, eos_id=4)
    assert_well_formed(decoded, decoding, 6, 4, 4)
    assert decoded.lengths.max() > 2


@pytest.mark.parametrize("options", [GREEDY, BEAM, DIVERSE, NUCLEUS])
def test_a_caption_that_reaches_max_tokens_ends_without_eos(options: dict[str, Any]) -> None:
    never_eos = torch.tensor([0.0, -1e4, 0.5, 0.7])
    decoded = run(build_decoding(options), constant_step(never_eos), ids(2))
    assert decoded.lengths.tolist() == [[8], [8]]
    assert EOS not in decoded.tokens


@pytest.mark.parametrize("options", [GREEDY, BEAM, DIVERSE, NUCLEUS])
@pytest.mark.parametrize("min_tokens", [0, 2, 5])
def test_eos_is_forbidden_below_min_tokens(options: dict[str, Any], min_tokens: int) -> None:
    always_eos = torch.tensor([0.0, 1e4, 0.5, 0.7])
    decoded = run(build_decoding(options | {"min_tokens": min_tokens}), constant_step(always_eos), ids(2))
    assert decoded.lengths.tolist() == [[max(min_tokens, 1) + 1]] * 2


@pytest.mark.parametrize("options", [GREEDY, BEAM, DIVERSE, NUCLEUS])
def test_decoding_stops_once_every_image_is_done(options: dict[str, Any]) -> None:
    model = Recurrent(images=3, vocabulary=9, seed=0, eos_bonus=50.0)
    step = model.step()
    decoded = run(build_decoding(options), step, ids(3))
    assert decoded.tokens.tolist() == [[[BOS, EOS]]] * 3
    assert len(step.calls) < 4


@pytest.mark.parametrize("options", ALL)
def test_decoding_keeps_no_graph_and_scores_half_precision_in_float32(options: dict[str, Any]) -> None:
    logits = torch.randn(9, dtype=torch.bfloat16, requires_grad=True)
    decoded = run(build_decoding(options), constant_step(logits), ids(2))
    assert not decoded.scores.requires_grad
    assert decoded.scores.dtype == torch.float32


@pytest.mark.parametrize("options", [*ALL, BEAM | {"early_stopping": "never"}])
@pytest.mark.parametrize("bad_call", [1, 3])
def test_logits_that_are_not_finite_are_reported_with_the_image(
    options: dict[str, Any], bad_call: int
) -> None:
    def step(newest: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        logits = torch.zeros(len(newest), 40)
        logits[:, 5], logits[:, 20] = 0.7, 0.5  # a beam that ends early must not hide what comes later
        if calls == bad_call:
            logits[len(newest) // 2 :] = torch.nan
        return logits

    calls = 0
    with pytest.raises(
        InputError, match=r"NaN or infinite for 1 of 2 images, the first is image-1; .*checkpoint"
    ):
        run(build_decoding(options), step, ids(2), eos_id=20)


# Settings


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "decoding").glob("*.yaml")))
def test_the_shipped_configuration_builds_each_method(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(overrides=[f"+decoding={name}"]).decoding)
    assert isinstance(config, dict)
    decoding = build_decoding({str(name): value for name, value in config.items()})
    assert {"method": decoding.method, **dataclasses.asdict(decoding)} == config
    assert (decoding.max_tokens, decoding.min_tokens) == (32, 2)


BAD_OPTIONS = [
    (GREEDY, "max_tokens", 1, "must be a whole number of at least 2; BOS and EOS are counted"),
    (GREEDY, "max_tokens", 8.0, "must be a whole number of at least 2"),
    (GREEDY, "min_tokens", -1, "at least 0 and below decoding.max_tokens=8; lower it or raise max_tokens"),
    (GREEDY, "min_tokens", 8, "at least 0 and below decoding.max_tokens=8; lower it or raise max_tokens"),
    (BEAM, "num_beams", 0, "must be at least 1; use decoding=greedy for one beam"),
    (BEAM, "num_beams", True, "must be at least 1"),
    (BEAM, "length_penalty", float("nan"), "must be a number from -10 to 10; use 0 for sums"),
    (BEAM, "length_penalty", 11, "must be a number from -10 to 10"),
    (BEAM, "length_penalty", "long", "must be a number from -10 to 10"),
    (BEAM, "early_stopping", "always", "must be true, false or never; use false"),
    (BEAM, "early_stopping", 1, "must be true, false or never"),
    (NUCLEUS, "temperature", 0, "must be a number from 0.01 to 100; use decoding=greedy for no randomness"),
    (NUCLEUS, "temperature", float("inf"), "must be a number from 0.01 to 100"),
    (NUCLEUS, "top_k", 0, "must be a whole number of at least 1; use null to keep all words"),
    (NUCLEUS, "top_k", 2.5, "must be a whole number of at least 1"),
    (NUCLEUS, "top_p", 0, "must be above 0 and at most 1; use 1 to keep all words, or decoding=greedy"),
    (NUCLEUS, "top_p", 1.1, "must be above 0 and at most 1"),
    (NUCLEUS, "seed", "x", "must be a whole number; use 0"),
    (NUCLEUS, "min_p", 1.1, "must be from 0 to 1; use 0 to keep all words"),
    (NUCLEUS, "num_return_sequences", 0, "must be at least 1"),
    (BEAM, "num_return_sequences", 4, "must be from 1 to decoding.num_beams=3; use more beams"),
    (BEAM, "num_beam_groups", 2, "must divide decoding.num_beams=3; use 1 for plain beam search"),
    (BEAM, "diversity_penalty", 0.5, "must be above 0 with decoding.num_beam_groups above 1, and 0 with one"),
    (DIVERSE, "diversity_penalty", 0.0, "must be above 0 with decoding.num_beam_groups above 1"),
    (DIVERSE, "diversity_penalty", 1e39, "must be at most 100 nats"),
    (GREEDY, "repetition_penalty", 0, "must be a number from 0.01 to 100; 1 changes nothing"),
    (NUCLEUS, "repetition_penalty", 1e-300, "must be a number from 0.01 to 100"),
    (BEAM, "repetition_penalty", 1e39, "must be a number from 0.01 to 100"),
    (GREEDY, "no_repeat_ngram_size", -1, "must be a whole number of at least 0; 0 forbids nothing"),
    (GREEDY, "banned", "dog", "must be a list of words or phrases; [] bans nothing"),
    (GREEDY, "banned", [" "], "must be a list of words or phrases; [] bans nothing"),
    (GREEDY, "prefix", None, "must be text; '' for none"),
    (
        GREEDY,
        "num_beams",
        3,
        "is no option of decoding=greedy, which takes max_tokens, min_tokens, repetition_penalty",
    ),
    (
        BEAM,
        "top_p",
        0.9,
        "is no option of decoding=beam, which takes max_tokens, min_tokens, repetition_penalty",
    ),
    (
        NUCLEUS,
        "beams",
        3,
        "is no option of decoding=nucleus, which takes max_tokens, min_tokens, repetition_penalty",
    ),
    (GREEDY, "method", "beams", "is no decoding method; use one of greedy, beam, nucleus, constrained"),
    (GREEDY, "method", None, "is no decoding method"),
    (GREEDY, "method", ["beam"], "is no decoding method"),
]


@pytest.mark.parametrize(("options", "name", "value", "rule"), BAD_OPTIONS)
def test_a_bad_option_is_named_with_its_limit_and_the_way_out(
    options: dict[str, Any], name: str, value: object, rule: str
) -> None:
    with pytest.raises(InputError) as caught:
        build_decoding(options | {name: value})
    message = str(caught.value)
    assert message.startswith(f"decoding.{name}={value} ")
    assert rule in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "name"), [(BEAM, "num_beams"), (NUCLEUS, "seed"), (GREEDY, "max_tokens")]
)
def test_a_missing_option_is_named(options: dict[str, Any], name: str) -> None:
    rest = {key: value for key, value in options.items() if key != name}
    with pytest.raises(
        InputError, match=f"^decoding.{name} is missing; decoding={options['method']} takes max"
    ):
        build_decoding(rest)


def test_a_prefix_that_leaves_no_room_or_is_banned_or_ends_the_text_is_refused() -> None:
    for change, message in (
        ({"prefix": "3 4 5", "max_tokens": 4}, "prefix='3 4 5' has 4 tokens with BOS and leaves no room"),
        (
            {"prefix": "3 4", "banned": ["4"]},
            r"prefix='3 4' must not say what decoding.banned=\['4'\] forbids",
        ),
        ({"prefix": "3 1"}, "prefix='3 1' must be words; the end of a text is none"),
    ):
        with pytest.raises(InputError, match=message):
            run(build_decoding(GREEDY | change), constant_step(torch.zeros(9)), ids(1))
