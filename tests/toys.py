"""Language models small enough to search exhaustively, and the settings that the decoding tests start from.

B images, R rows, T tokens, V words, D width.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from efficap.decoding import Decoded, Decoding
from efficap.models.captioner import DecodingState
from efficap.models.gpt2 import GPT2
from efficap.models.pretrained.gpt2 import gpt2_state_dict

BOS, EOS = 0, 1


class InTurn:
    """An order of samples as the data have them, every time."""

    def __init__(self, size: int) -> None:
        self.size = size

    def samples(self, time: int, start: int, stop: int) -> NDArray[np.int64]:
        return np.arange(start, stop)


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
DIVERSE = {**BEAM, "num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0}
CONSTRAINED = {**BEAM, "method": "constrained", "num_beams": 6, "required": ["6", "7 5"]}
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


class Numbers:
    """A vocabulary whose words are the ids themselves: "3 5" is [3, 5]."""

    def encode_prefix(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def spellings(self, phrase: str) -> list[list[int]]:
        return [self.encode_prefix(phrase)]

    usual_spellings = spellings


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


class GPT2Pair:
    """This project's GPT-2 and transformers', with the same random weights, over random memories (B, N, D)."""

    def __init__(
        self, seed: int, *, eos_id: int, images: int = 4, vocabulary: int = 23, eos_bonus: float = 2.0
    ) -> None:
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=24,
            n_embd=16,
            n_layer=2,
            n_head=2,
            add_cross_attention=True,
            initializer_range=0.4,
            bos_token_id=BOS,
            eos_token_id=eos_id,
            pad_token_id=eos_id,
        )
        self.theirs = GPT2LMHeadModel(config).eval()
        with torch.no_grad():  # captions of several lengths; the head is the embedding and has no bias
            eos = self.theirs.transformer.wte.weight[eos_id]
            self.theirs.transformer.ln_f.bias += eos_bonus * eos / eos.dot(eos)
        self.ours = GPT2(
            vocab_size=vocabulary, n_positions=24, n_embd=16, n_layer=2, n_head=2, dropout=0.0
        ).eval()
        self.ours.load_state_dict(gpt2_state_dict(self.theirs.state_dict()))
        self.memory = torch.randn(images, 5, 16) + 3 * torch.randn(images, 1, 16)  # pictures that differ

    def step(self, max_tokens: int, rows: list[int] | None = None) -> Counted:
        memory = self.memory if rows is None else self.memory[rows]
        with torch.no_grad():
            return Counted(DecodingState(self.ours, memory, max_tokens))

    def generate(self, decoding: Decoding, prompt: list[int], **options: Any) -> Any:
        """transformers' captions with the limits of `decoding`, and whatever else is asked of it."""
        ids = torch.tensor([prompt]).expand(len(self.memory), -1)
        return self.theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=self.memory,
            max_length=decoding.max_tokens,
            min_length=decoding.min_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


class Counted:
    """The real step function, and how many rows each call had."""

    def __init__(self, state: DecodingState) -> None:
        self.state = state
        self.rows: list[int] = []

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        self.rows.append(len(ids))
        return self.state(ids, parents, images)


def ids(count: int) -> list[str]:
    return [f"image-{i}" for i in range(count)]


def run(
    decoding: Decoding, step: Any, image_ids: list[str], *, bos_id: int = BOS, eos_id: int = EOS
) -> Decoded:
    return decoding.decode(step, image_ids, bos_id=bos_id, eos_id=eos_id, device="cpu", vocabulary=Numbers())


def constant_step(logits: Tensor) -> Any:
    return lambda newest, parents, images: logits.expand(len(newest), -1)


def captions(decoded: Decoded) -> list[list[list[int]]]:
    """The tokens of each caption of each image, without padding."""
    return [
        [row[:length] for row, length in zip(rows, lengths, strict=True)]
        for rows, lengths in zip(decoded.tokens.tolist(), decoded.lengths.tolist(), strict=True)
    ]


def contains(tokens: list[int], part: list[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))


def assert_well_formed(decoded: Decoded, decoding: Decoding, images: int, bos_id: int, eos_id: int) -> None:
    """What every method promises of every caption."""
    samples = getattr(decoding, "num_return_sequences", 1)
    prompt = (
        [bos_id, *Numbers().encode_prefix(decoding.prefix)] if decoding.prefix[:1].isdigit() else [bos_id]
    )
    assert decoded.tokens.dtype == decoded.lengths.dtype == torch.int64
    assert decoded.scores.dtype == decoded.token_log_probs.dtype == torch.float32
    assert decoded.tokens.shape == (images, samples, int(decoded.lengths.max()))
    assert (decoded.scores > -math.inf).all()
    for image, rows in enumerate(captions(decoded)):
        for sample, caption in enumerate(rows):
            length = len(caption)
            assert 2 <= length <= decoding.max_tokens
            assert caption[: len(prompt)] == prompt
            assert eos_id not in caption[1 : length - 1]
            assert set(decoded.tokens[image, sample, length:].tolist()) <= {eos_id}
            assert bool(decoded.ended[image, sample]) == (caption[-1] == eos_id)
            if length < decoding.max_tokens:
                assert caption[-1] == eos_id
            if caption[-1] == eos_id:
                assert length > decoding.min_tokens
