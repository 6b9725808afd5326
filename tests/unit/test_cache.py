"""The cache of decoding against the whole sequence read again: any parents, more rows, fewer pictures.

B images, G rows of each, T tokens, V words, D width.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from toys import BEAM, EOS, GREEDY, NUCLEUS, GPT2Pair, captions, ids, run

from efficap.decoding import build_decoding
from efficap.models.captioner import DecodingState, FixedDecodingState
from efficap.models.gpt2 import GPT2


def read_again(decoder: GPT2, memory: Tensor, history: Tensor) -> Tensor:
    """The logits after (B, G, T) tokens, each row with its own copy of its picture's memory: (B*G, V)."""
    rows = memory.repeat_interleave(history.shape[1], dim=0)  # (B*G, N, D)
    hidden = decoder(history.flatten(0, 1), decoder.project_memory(rows))
    return decoder.logits(hidden[:, -1])


def random_parents(images: int, before: int, after: int) -> Tensor:
    """(B*G',) for each new row, a row of its own picture."""
    own = torch.randint(0, before, (images, after))
    return (own + torch.arange(images)[:, None] * before).flatten()


def fixed(decoder: GPT2, memory: Tensor, max_tokens: int) -> FixedDecodingState:
    """The pictures and two more that fill the batch up."""
    filled = torch.cat((memory, torch.zeros(2, *memory.shape[1:], dtype=memory.dtype)))
    return FixedDecodingState(decoder, filled, max_tokens, len(memory), decoder.step, rows=1)


@pytest.mark.parametrize("start", [DecodingState, fixed])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_cached_steps_equal_the_whole_sequence(
    start: Callable[..., DecodingState], seed: int, dtype: torch.dtype, tolerance: float
) -> None:
    draw = random.Random(seed)
    pair = GPT2Pair(seed, eos_id=1, images=6)
    decoder, memory = pair.ours.to(dtype), pair.memory.to(dtype)
    state, rows, max_tokens = start(decoder, memory, 14), 1, 14
    history = torch.empty(6, 1, 0, dtype=torch.int64)  # (B, G, T)
    left = grown = 0
    for _ in range(max_tokens):
        images, parents, keep = len(memory), None, None
        if history.shape[2] > 2 and draw.random() < 0.7:  # a prefix first
            more = rows + draw.choice([0, 1, 3])
            parents = random_parents(images, rows, more).view(images, more)
            history = history.flatten(0, 1)[parents]
            grown, rows = grown + (more > rows), more
            if images > 1 and draw.random() < 0.4:
                keep = torch.tensor(sorted(draw.sample(range(images), draw.randint(1, images - 1))))
                parents, history, memory, left = parents[keep], history[keep], memory[keep], left + 1
            parents = parents.flatten()
        newest = torch.randint(0, 23, (*history.shape[:2], 1))
        history = torch.cat((history, newest), dim=2)
        logits = state(newest.flatten(), parents, keep)
        expected = read_again(decoder, memory, history)
        scale = 1.0 if dtype == torch.float32 else float(expected.abs().max())
        assert (logits - expected).abs().max() <= tolerance * scale
    assert left
    assert grown


@torch.no_grad()
def test_pictures_may_leave_before_the_rows_grow() -> None:
    pair = GPT2Pair(0, eos_id=1, images=3)
    state = DecodingState(pair.ours, pair.memory, 4)
    first, then = torch.tensor([0, 0, 0]), torch.tensor([5, 6, 7, 8])
    state(first, None)
    keep = torch.tensor([0, 2])
    logits = state(then, torch.tensor([0, 0, 2, 2]), keep)
    history = torch.stack((torch.zeros(2, 2, dtype=torch.int64), then.view(2, 2)), dim=2)
    assert (logits - read_again(pair.ours, pair.memory[keep], history)).abs().max() < 2e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "others"),  # the prompt, where rows are not as many as later
    [(GREEDY, 0), (BEAM, 1), ({**NUCLEUS, "num_return_sequences": 3}, 1)],
)
def test_decoding_compiles_one_step_for_all_lengths_and_batches(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], others: int
) -> None:
    pair, counter = GPT2Pair(0, eos_id=EOS, images=6), CompileCounter()
    eager = pair.ours.step
    step = torch.compile(eager, backend=counter, dynamic=False, fullgraph=True)
    decoding = build_decoding({**settings, "max_tokens": 12})
    for memory in (pair.memory, pair.memory[:4]):
        expected = run(decoding, DecodingState(pair.ours, memory, decoding.max_tokens), ids(len(memory)))
        state = FixedDecodingState(
            pair.ours, pair.memory, decoding.max_tokens, len(memory), step, decoding.rows
        )
        with monkeypatch.context() as patch:
            uncompiled: list[Tensor] = []
            patch.setattr(
                pair.ours, "step", lambda ids, *rest, to=uncompiled: to.append(ids) or eager(ids, *rest)
            )
            found = run(decoding, state, ids(len(memory)))
        assert len(uncompiled) == others
        assert captions(found) == captions(expected)
        assert (found.scores - expected.scores).abs().max() < 1e-4
    assert len(set(expected.lengths.flatten().tolist())) > 1  # so that pictures leave
    assert counter.frame_count == 1


@pytest.mark.parametrize("pack", [False, True])
@torch.no_grad()
def test_in_bfloat16_logits_keep_their_distances_whatever_all_words_have_in_common(pack: bool) -> None:
    decoder = GPT2(vocab_size=300, n_positions=8, n_embd=64, n_layer=1, n_head=4, dropout=0.0).eval()
    decoder.wte.weight.copy_(0.05 * torch.randn(300, 64) - 0.5)
    hidden = F.layer_norm(torch.randn(20, 64), (64,)) + 3.0
    exact = hidden.double() @ decoder.wte.weight.double().T
    assert float(exact.mean()) < -90
    plain = decoder.logits(hidden)
    half = decoder.to(torch.bfloat16)
    hidden = hidden.to(torch.bfloat16)
    exact = hidden.double() @ half.wte.weight.double().T
    rounded = (half.logits(hidden).double() - exact).abs().max()
    half.keep_head(pack=pack)
    found = half.logits(hidden)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 0.1 < rounded
    half.drop_head()
    decoder.float().keep_head(pack=pack)
    torch.testing.assert_close(decoder.logits(hidden.float()).mean(), plain.mean(), rtol=0.01, atol=0)
