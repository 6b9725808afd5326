"""All methods with any settings over real tokenizers: what every caption has and what none has.

B images, T tokens, V words.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from toys import CONSTRAINED, GREEDY, NUCLEUS, Recurrent, assert_well_formed, captions, contains, ids

from efficap.decoding import Decoded, Decoding, build_decoding
from efficap.errors import InputError
from efficap.token_divisions import in_bytes
from efficap.tokenizer import CaptionTokenizer

SENTENCES = [
    "a red dog on a red bench",
    "two dogs and a hot dog",
    "the cat sits on the hot bench",
    "Red cats",
] * 4
TOKENIZERS = [CaptionTokenizer.learn(SENTENCES, vocab_size=size) for size in (258, 275, 330)]
WORDS = ["dog", "Red", "hot dog", "cat", "a", "on the", "bench"]

limits = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(4, 24),
        "min_tokens": st.integers(0, 3),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 0.5, 1.5]),
        "no_repeat_ngram_size": st.sampled_from([0, 0, 1, 2, 3]),
        "banned": st.lists(st.sampled_from(WORDS), max_size=2),
        "prefix": st.sampled_from(["", "", "a", " the cat"]),
    }
)
greedy = st.fixed_dictionaries({"method": st.just("greedy")})
nucleus = st.fixed_dictionaries(
    {
        "method": st.just("nucleus"),
        "temperature": st.floats(0.01, 100),
        "top_k": st.none() | st.integers(1, 999),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "num_return_sequences": st.integers(1, 4),
        "seed": st.integers(-5, 2**70),
    }
)
search = {
    "length_penalty": st.floats(-10, 10),
    "early_stopping": st.sampled_from([True, False, "never"]),
}
beam = st.fixed_dictionaries(
    {"method": st.just("beam"), **search, "num_beams": st.integers(1, 7)}
    | {"num_beam_groups": st.just(1), "diversity_penalty": st.just(0.0), "num_return_sequences": st.just(1)}
)
diverse = st.fixed_dictionaries(
    {"method": st.just("beam"), **search, "num_beams": st.sampled_from([6, 12])}
    | {"num_beam_groups": st.sampled_from([2, 3, 6]), "diversity_penalty": st.floats(0.01, 50)}
    | {"num_return_sequences": st.integers(1, 6)}
)
constrained = st.fixed_dictionaries(
    {"method": st.just("constrained"), **search, "num_beams": st.integers(3, 9)}
    | {"num_beam_groups": st.just(1), "diversity_penalty": st.just(0.0)}
    | {"num_return_sequences": st.integers(1, 3)}
    | {"required": st.lists(st.sampled_from(WORDS), max_size=3)}
)


@st.composite
def any_settings(draw: st.DrawFn) -> dict[str, Any]:
    own = draw(st.one_of(greedy, nucleus, beam, diverse, constrained))
    return draw(limits) | own


@settings(max_examples=250, deadline=None)
@given(
    options=any_settings(),
    tokenizer=st.sampled_from(TOKENIZERS),
    seed=st.integers(0, 99),
    eos_bonus=st.sampled_from([-30.0, 0.0, 3.0, 30.0]),
)
@example(options=CONSTRAINED | {"required": []}, tokenizer=TOKENIZERS[0], seed=0, eos_bonus=0.0)
def test_any_setting_of_any_method_keeps_its_promises(
    options: dict[str, Any], tokenizer: CaptionTokenizer, seed: int, eos_bonus: float
) -> None:
    options["min_tokens"] = min(options["min_tokens"], options["max_tokens"] - 1)
    decoding = build_decoding(options)
    model = Recurrent(2, tokenizer.vocab_size, seed)
    model.bias[talked_of(tokenizer)] += 6.0
    model.bias[tokenizer.eos_id] += eos_bonus
    try:
        decoded = written(decoding, model, tokenizer)
    except InputError as error:  # the words have no room, or contradict each other
        assert str(error).startswith(("decoding.required=", "decoding.prefix="))  # noqa: PT017
        return
    assert_well_formed(decoded, decoding, 2, tokenizer.bos_id, tokenizer.eos_id)
    prompt = [tokenizer.bos_id, *tokenizer.encode_prefix(decoding.prefix)]
    for rows in captions(decoded):
        for caption in rows:
            assert caption[: len(prompt)] == prompt
            assert_words(decoding, caption, tokenizer)
            assert_no_repeats(decoding, caption, len(prompt), tokenizer)


def written(decoding: Decoding, model: Recurrent, tokenizer: CaptionTokenizer) -> Decoded:
    bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id
    return decoding.decode(
        model.step(), ids(2), bos_id=bos_id, eos_id=eos_id, device="cpu", vocabulary=tokenizer
    )


def talked_of(tokenizer: CaptionTokenizer) -> list[int]:
    """The tokens of what may be required or banned, so that the model says it often."""
    spelled = [token for word in WORDS for way in tokenizer.usual_spellings(word) for token in way]
    return sorted(set(spelled) - {tokenizer.bos_id})


def assert_words(decoding: Decoding, caption: list[int], tokenizer: CaptionTokenizer) -> None:
    for phrase in getattr(decoding, "required", []):
        assert any(contains(caption, way) for way in tokenizer.usual_spellings(phrase))
        assert phrase in tokenizer.decode(caption)
    text = "".join(tokenizer._tokenizer.id_to_token(i) or "" for i in caption if i != tokenizer.bos_id)
    for phrase in decoding.banned:
        for form in (phrase, phrase.lower(), phrase.capitalize()):
            inside, first = in_bytes(f" {form}"), in_bytes(form)
            # "cats" may be one token, and another word.
            assert not re.search(re.escape(inside) + "(?![A-Za-z])", text)
            assert not re.match(re.escape(first) + "(?![A-Za-z])", text)


def assert_no_repeats(
    decoding: Decoding, caption: list[int], prompt: int, tokenizer: CaptionTokenizer
) -> None:
    """But in a prefix, which says what it says, and in required words."""
    size = decoding.no_repeat_ngram_size
    exempt = {
        token
        for phrase in getattr(decoding, "required", [])
        for way in tokenizer.usual_spellings(phrase)
        for token in way
    }
    seen = set()
    for end in range(size, len(caption) + 1) if size else ():
        gram = tuple(caption[end - size : end])
        said_by_the_model = end > prompt and gram[-1] not in exempt | {tokenizer.eos_id}
        assert not (gram in seen and said_by_the_model)
        seen.add(gram)


def test_the_model_is_tempted() -> None:
    """Without the rules, the captions of the test above do say what is banned and repeat themselves."""
    tokenizer = TOKENIZERS[2]
    said = 0
    for seed in range(10):
        model = Recurrent(2, tokenizer.vocab_size, seed)
        model.bias[talked_of(tokenizer)] += 6.0
        for options in (GREEDY | {"max_tokens": 24}, NUCLEUS | {"max_tokens": 24}):
            for [caption] in captions(written(build_decoding(options), model, tokenizer)):
                said += any(f" {word}" in f" {tokenizer.decode(caption)}" for word in WORDS)
                assert torch.tensor(caption).unique().numel() < len(caption)
    assert said > 20
