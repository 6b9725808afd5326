"""Decoding against references that share nothing with it: exhaustive search, and transformers' generate.

B images, R rows, T tokens, V words, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from efficap.decoding import Beam, Decoded, Decoding, build_decoding
from efficap.decoding.sampling import uniform_numbers
from efficap.errors import InputError

BOS, EOS = 0, 1
CONF = Path(__file__).parents[2] / "conf"
RULES = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "banned": [], "prefix": ""}
GREEDY = {"method": "greedy", "max_tokens": 8, "min_tokens": 0, **RULES}
BEAM = {
    **GREEDY,
    "method": "beam",
    "num_beams": 3,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
NUCLEUS = {
    **GREEDY,
    "method": "nucleus",
    "temperature": 1.0,
    "top_k": None,
    "top_p": 0.9,
    "min_p": 0.0,
    "num_return_sequences": 1,
    "seed": 0,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Recurrent:
    """A small recurrent language model, so that a row's logits depend on all that it has read."""

    def __init__(self, images: int, vocabulary: int, seed: int, eos_bonus: float = 0.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.start = torch.randn(images, 8, generator=random, dtype=torch.float64)  # (B, D)
        self.recur = torch.randn(8, 8, generator=random, dtype=torch.float64)
        self.embed = torch.randn(vocabulary, 8, generator=random, dtype=torch.float64)
        self.head = torch.randn(8, vocabulary, generator=random, dtype=torch.float64)
        self.bias = torch.zeros(vocabulary, dtype=torch.float64)
        self.bias[EOS] = eos_bonus

    def read(self, state: Tensor, ids: Tensor) -> Tensor:
        return torch.tanh(state @ self.recur + self.embed[ids])

    def logits(self, state: Tensor) -> Tensor:
        return state @ self.head + self.bias

    def step(self, rows: list[int] | None = None) -> RecurrentStep:
        return RecurrentStep(self, self.start if rows is None else self.start[rows])


class RecurrentStep:
    def __init__(self, model: Recurrent, state: Tensor) -> None:
        self.model, self.state = model, state
        self.calls: list[tuple[Tensor, Tensor | None]] = []

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        self.calls.append((ids, parents))
        state = self.state if parents is None else self.state[parents]
        self.state = self.model.read(state, ids)
        return self.model.logits(self.state)


class GPT2Step:
    """A GPT-2 with cross-attention and no cache: it reads each row's whole history again."""

    def __init__(self, model: GPT2LMHeadModel, memory: Tensor) -> None:
        self.model, self.memory = model, memory
        self.history = torch.empty(len(memory), 0, dtype=torch.int64)

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        if parents is not None:
            self.history, self.memory = self.history[parents], self.memory[parents]
        self.history = torch.cat((self.history, ids[:, None]), dim=1)
        return self.model(self.history, encoder_hidden_states=self.memory).logits[:, -1]


def tiny_gpt2(seed: int, eos_id: int) -> tuple[GPT2LMHeadModel, Tensor]:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=19,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        add_cross_attention=True,
        initializer_range=0.4,
        bos_token_id=BOS,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    model = GPT2LMHeadModel(config).eval()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(19))
    model.lm_head.bias.data[eos_id] = 2.0  # captions of several lengths
    return model, torch.randn(4, 5, 16)


def beam_search(**changes: Any) -> Beam:
    decoding = build_decoding(BEAM | changes)
    assert isinstance(decoding, Beam)
    return decoding


def greedy_search(**changes: Any) -> Decoding:
    return build_decoding(GREEDY | changes)


def ids(count: int) -> list[str]:
    return [f"image-{i}" for i in range(count)]


def run(
    decoding: Decoding, step: Any, image_ids: list[str], *, bos_id: int = BOS, eos_id: int = EOS
) -> Decoded:
    return decoding.decode(step, image_ids, bos_id=bos_id, eos_id=eos_id, device="cpu")


def constant_step(logits: Tensor) -> Any:
    return lambda newest, parents, images: logits.expand(len(newest), -1)


def assert_well_formed(decoded: Decoded, decoding: Decoding, images: int, bos_id: int, eos_id: int) -> None:
    assert decoded.tokens.dtype == decoded.lengths.dtype == torch.int64
    assert decoded.scores.dtype == torch.float32
    assert decoded.tokens.shape == (images, 1, int(decoded.lengths.max()))
    assert decoded.scores.isfinite().all()
    for caption, length in zip(decoded.tokens[:, 0].tolist(), decoded.lengths[:, 0].tolist(), strict=True):
        assert 2 <= length <= decoding.max_tokens
        assert caption[0] == bos_id
        assert eos_id not in caption[1 : length - 1]
        assert set(caption[length:]) <= {eos_id}
        if length < decoding.max_tokens:
            assert caption[length - 1] == eos_id
        if caption[length - 1] == eos_id:
            assert length > decoding.min_tokens


# Beam search


def all_captions(
    model: Recurrent, state: Tensor, caption: list[int], score: float, beam: Beam, eos_id: int
) -> Iterator[tuple[float, list[int]]]:
    """Every caption that starts with `caption`, with its score: the definition, without a search."""
    state = model.read(state, torch.tensor(caption[-1]))
    for word, gain in enumerate(model.logits(state).log_softmax(-1).tolist()):
        longer = [*caption, word]
        if word == eos_id and len(caption) < beam.min_tokens:
            continue
        if word == eos_id or len(longer) == beam.max_tokens:
            yield (score + gain) / len(caption) ** beam.length_penalty, longer
        else:
            yield from all_captions(model, state, longer, score + gain, beam, eos_id)


@pytest.mark.parametrize("eos_id", [BOS, EOS])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize(
    ("length_penalty", "min_tokens"), [(0.0, 0), (1.0, 0), (2.0, 3), (-1.0, 0), (-1.0, 4)]
)
def test_a_beam_too_wide_to_prune_finds_the_best_of_all_captions(
    eos_id: int, early_stopping: Any, length_penalty: float, min_tokens: int
) -> None:
    beam = beam_search(
        max_tokens=5,
        min_tokens=min_tokens,
        num_beams=64,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    model = Recurrent(images=3, vocabulary=4, seed=3)
    decoded = run(beam, model.step(), ids(3), eos_id=eos_id)
    for image in range(3):
        score, caption = max(all_captions(model, model.start[image], [BOS], 0.0, beam, eos_id))
        length = int(decoded.lengths[image, 0])
        assert decoded.tokens[image, 0, :length].tolist() == caption
        assert float(decoded.scores[image, 0]) == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("eos_id", [BOS, 7])
@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize(
    ("length_penalty", "min_tokens", "max_tokens"),
    [(1.0, 0, 12), (0.0, 5, 12), (2.5, 3, 9), (-0.7, 4, 7), (-2.0, 0, 12)],
)
def test_beam_search_equals_transformers(
    eos_id: int, early_stopping: Any, num_beams: int, length_penalty: float, min_tokens: int, max_tokens: int
) -> None:
    model, memory = tiny_gpt2(seed=num_beams, eos_id=eos_id)
    beam = beam_search(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    decoded = run(beam, GPT2Step(model, memory), ids(4), eos_id=eos_id)
    assert_well_formed(decoded, beam, 4, BOS, eos_id)
    expected = generate(
        model,
        memory,
        beam,
        do_sample=False,
        num_beams=num_beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
    )
    assert torch.equal(decoded.tokens[:, 0], expected.sequences)
    torch.testing.assert_close(decoded.scores[:, 0], expected.sequences_scores, atol=1e-4, rtol=1e-6)


def generate(model: GPT2LMHeadModel, memory: Tensor, decoding: Decoding, **options: Any) -> Any:
    prompt = torch.full((len(memory), 1), BOS)
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        encoder_hidden_states=memory,
        max_length=decoding.max_tokens,
        min_length=decoding.min_tokens,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


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


def test_a_vocabulary_smaller_than_the_beam_gives_no_empty_hypothesis() -> None:
    model = Recurrent(images=2, vocabulary=2, seed=0)
    beam = build_decoding(BEAM | {"num_beams": 5, "early_stopping": True})
    decoded = run(beam, model.step(), ids(2))
    assert_well_formed(decoded, beam, 2, BOS, EOS)


# Greedy


@pytest.mark.parametrize("eos_id", [BOS, 7])
@pytest.mark.parametrize("min_tokens", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_transformers(eos_id: int, min_tokens: int, seed: int) -> None:
    model, memory = tiny_gpt2(seed, eos_id)
    greedy = greedy_search(max_tokens=10, min_tokens=min_tokens)
    decoded = run(greedy, GPT2Step(model, memory), ids(4), eos_id=eos_id)
    expected = generate(model, memory, greedy, do_sample=False, num_beams=1)
    assert torch.equal(decoded.tokens[:, 0], expected.sequences)


def test_greedy_scores_are_sums_of_log_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0])
    decoded = run(greedy_search(max_tokens=4, min_tokens=0), constant_step(logits), ids(2))
    expected = 3 * logits.log_softmax(-1)[2]
    assert decoded.tokens[:, 0].tolist() == [[BOS, 2, 2, 2]] * 2
    torch.testing.assert_close(decoded.scores[:, 0], expected.expand(2))


# Nucleus sampling


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 0.8), (0.6, None, 1.0), (1.7, 4, 0.75), (1.0, 3, 1.0)]
)
def test_nucleus_frequencies_agree_with_the_exact_distribution(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.tensor([[0.3, -0.4, 1.2, 2.0, 0.9, -1.0, 1.6]])
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    exact = TopPLogitsWarper(top_p)(None, scores).softmax(-1)[0]  # (V,)
    nucleus = build_decoding(
        NUCLEUS | {"max_tokens": 2, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    )
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


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_extreme_random_numbers_stay_inside_the_nucleus(
    extreme: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "efficap.decoding.sampling.uniform_numbers",
        lambda seed, keys, count: torch.full((len(keys), count), extreme),
    )
    logits = torch.randn(
        2000, 50, generator=torch.Generator().manual_seed(0)
    )  # sums round to either side of 1
    nucleus = build_decoding(NUCLEUS | {"top_p": top_p, "max_tokens": 3, "min_tokens": 2})
    words = run(nucleus, lambda newest, parents, images: logits, ids(2000)).tokens[:, 0, 1]
    logits[:, EOS] = -torch.inf  # as min_tokens forbids it
    kept = TopPLogitsWarper(top_p)(None, logits)
    expected = kept.argmax(-1) if extreme == 0 else kept.masked_fill(kept.isinf(), torch.inf).argmin(-1)
    assert (words != EOS).all()
    assert (words == expected).float().mean() > 0.99  # both sides round


def test_image_ids_may_be_any_text() -> None:
    odd = ["", "a b", "ü/é", "\ud800", "0 a"]
    assert len(uniform_numbers(0, odd, 2).unique()) == 10


# All methods


@pytest.mark.parametrize("options", [GREEDY, BEAM, BEAM | {"early_stopping": True}, NUCLEUS])
def test_a_caption_does_not_depend_on_its_neighbours(options: dict[str, Any]) -> None:
    model = Recurrent(images=6, vocabulary=9, seed=5, eos_bonus=1.5)
    decoding = build_decoding(options)
    together = run(decoding, model.step(), ids(6))
    assert len(together.lengths.unique()) > 2
    for rows in ([0], [3], [5, 2], [4, 1, 0]):
        apart = run(decoding, model.step(rows), [f"image-{row}" for row in rows])
        longest = apart.tokens.shape[-1]
        assert torch.equal(apart.tokens, together.tokens[rows, :, :longest])
        assert torch.equal(apart.lengths, together.lengths[rows])
        torch.testing.assert_close(apart.scores, together.scores[rows])


@pytest.mark.parametrize("options", [GREEDY, BEAM, NUCLEUS])
def test_bos_that_is_also_eos_does_not_end_the_caption(options: dict[str, Any]) -> None:
    model = Recurrent(images=6, vocabulary=9, seed=5)
    decoding = build_decoding(options)
    decoded = run(decoding, model.step(), ids(6), bos_id=4, eos_id=4)
    assert_well_formed(decoded, decoding, 6, 4, 4)
    assert decoded.lengths.max() > 2


@pytest.mark.parametrize("options", [GREEDY, BEAM, NUCLEUS])
def test_a_caption_that_reaches_max_tokens_ends_without_eos(options: dict[str, Any]) -> None:
    never_eos = torch.tensor([0.0, -1e4, 0.5, 0.7])
    decoded = run(build_decoding(options), constant_step(never_eos), ids(2))
    assert decoded.lengths.tolist() == [[8], [8]]
    assert EOS not in decoded.tokens


@pytest.mark.parametrize("options", [GREEDY, BEAM, NUCLEUS])
@pytest.mark.parametrize("min_tokens", [0, 2, 5])
def test_eos_is_forbidden_below_min_tokens(options: dict[str, Any], min_tokens: int) -> None:
    always_eos = torch.tensor([0.0, 1e4, 0.5, 0.7])
    decoded = run(build_decoding(options | {"min_tokens": min_tokens}), constant_step(always_eos), ids(2))
    assert decoded.lengths.tolist() == [[max(min_tokens, 1) + 1]] * 2


@pytest.mark.parametrize("options", [GREEDY, BEAM, NUCLEUS])
def test_decoding_stops_once_every_image_is_done(options: dict[str, Any]) -> None:
    model = Recurrent(images=3, vocabulary=9, seed=0, eos_bonus=50.0)
    step = model.step()
    decoded = run(build_decoding(options), step, ids(3))
    assert decoded.tokens.tolist() == [[[BOS, EOS]]] * 3
    assert len(step.calls) < 4


@pytest.mark.parametrize("options", [GREEDY, BEAM, NUCLEUS])
def test_decoding_keeps_no_graph_and_scores_half_precision_in_float32(options: dict[str, Any]) -> None:
    logits = torch.randn(9, dtype=torch.bfloat16, requires_grad=True)
    decoded = run(build_decoding(options), constant_step(logits), ids(2))
    assert not decoded.scores.requires_grad
    assert decoded.scores.dtype == torch.float32


@pytest.mark.parametrize("options", [GREEDY, BEAM, BEAM | {"early_stopping": "never"}, NUCLEUS])
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


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_valid_setting_gives_well_formed_captions(data: st.DataObject) -> None:
    max_tokens = data.draw(st.integers(2, 7))
    options: dict[str, Any] = {
        **RULES,
        "max_tokens": max_tokens,
        "min_tokens": data.draw(st.integers(0, max_tokens - 1)),
    }
    own: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "greedy": {},
        "beam": {
            "num_beams": st.integers(1, 7),
            "length_penalty": st.floats(-10, 10),
            "early_stopping": st.sampled_from([True, False, "never"]),
            "num_return_sequences": st.just(1),
            "num_beam_groups": st.just(1),
            "diversity_penalty": st.just(0.0),
        },
        "nucleus": {
            "temperature": st.floats(0.01, 100),
            "top_k": st.none() | st.integers(1, 99),
            "top_p": st.floats(0, 1, exclude_min=True),
            "min_p": st.just(0.0),
            "num_return_sequences": st.just(1),
            "seed": st.integers(-5, 2**70),
        },
    }
    options["method"] = data.draw(st.sampled_from(sorted(own)))
    options |= {name: data.draw(strategy) for name, strategy in own[options["method"]].items()}
    images, vocabulary = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    bonus = data.draw(st.floats(-30, 30))
    bos_id = data.draw(st.sampled_from([BOS, EOS]))
    model = Recurrent(images, vocabulary, seed=data.draw(st.integers(0, 99)), eos_bonus=bonus)
    decoding = build_decoding(options)
    decoded = run(decoding, model.step(), ids(images), bos_id=bos_id)
    assert_well_formed(decoded, decoding, images, bos_id, EOS)


# Settings


@pytest.mark.parametrize("method", ["greedy", "beam", "nucleus"])
def test_the_shipped_configuration_builds_each_method(method: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose(overrides=[f"+decoding={method}"]).decoding)
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
    (GREEDY, "method", "beams", "is no decoding method; use one of greedy, beam, nucleus"),
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
