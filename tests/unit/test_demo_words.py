"""A caption's words out of its tokens: their probabilities and where the model looked."""

from __future__ import annotations

import math

import pytest
import torch

from efficap.demo.words import words_of
from efficap.tokenizer import CaptionTokenizer
from efficap.training.writer import WrittenCaption


def caption_of(tokenizer: CaptionTokenizer, text: str, *, ended: bool = True) -> WrittenCaption:
    """A caption whose token t has the log-probability -t / 10 and looked at place t mod 6 alone."""
    [[*tokens]], _ = tokenizer.encode([text], max_tokens=64)
    tokens = tokens if ended else tokens[:-1]
    log_probs = [0.0, *(-place / 10 for place in range(1, len(tokens)))]
    attention = torch.eye(6)[torch.arange(1, len(tokens)) % 6]  # (T - 1, 6)
    return WrittenCaption(tokenizer.decode(tokens), -1.0, ended, tokens, log_probs, attention)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("vocab_size", [257, 280, 400])
@pytest.mark.parametrize("text", ["a brown dog, running.", "ein süßer Hund 犬", "dog"])
def test_the_tokens_of_a_caption_are_shared_out_among_its_words(
    text: str, vocab_size: int, ended: bool
) -> None:
    tokenizer = CaptionTokenizer.learn(["a brown dog runs", "dogs running, running"], vocab_size)
    caption = caption_of(tokenizer, text, ended=ended)
    words = words_of(caption, tokenizer, (2, 3))
    assert [word.text for word in words] == text.split()
    written = caption.token_log_probs[1:-1] if ended else caption.token_log_probs[1:]
    assert math.prod(word.probability for word in words) == pytest.approx(math.exp(sum(written)))
    place = 1
    for word in words:
        ids = tokenizer.encode_prefix(word.text)  # each word begins with its space
        expected = caption.attention[place - 1 : place - 1 + len(ids)].mean(dim=0).view(2, 3)
        assert torch.equal(word.attention, expected)
        place += len(ids)


def test_without_attention_words_have_none() -> None:
    tokenizer = CaptionTokenizer.learn(["a dog"], 260)
    caption = WrittenCaption("a dog", -1.0, True, *[[*x] for x in ((0, 1), (0.0, -1.0))])
    assert words_of(caption_of(tokenizer, "a dog"), tokenizer, None)[0].attention is None
    assert [word.attention for word in words_of(caption, tokenizer, (2, 3))] == [None, None]
