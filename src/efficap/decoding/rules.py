"""Which words may come next, given those so far: what transformers calls logits processors.

R rows, t tokens of each so far, V words, M sequences of one length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Rules:
    """Applied to the scores of the next word: log-probabilities in beam search, logits elsewhere, as transformers does.

    Args:
        prompt: BOS, and the ids of a prefix.
        eos_id: forbidden while a sequence has fewer than `min_tokens` tokens, BOS counted.
        repetition_penalty: divides the positive and multiplies the negative scores of words that were said (Keskar et
            al. 2019, arXiv:1909.05858); 1 changes nothing.
        no_repeat_ngram_size: no sequence of so many tokens comes twice (Paulus et al. 2018, arXiv:1705.04304); 0: any.
        banned: sequences of ids that never come.
    """

    def __init__(
        self,
        *,
        prompt: Sequence[int],
        eos_id: int,
        min_tokens: int,
        repetition_penalty: float,
        no_repeat_ngram_size: int,
        banned: Sequence[Sequence[int]],
        device: torch.device,
    ) -> None:
        self.prompt = list(prompt)
        self.eos_id, self.min_tokens = eos_id, min_tokens
        self.repetition_penalty, self.no_repeat_ngram_size = repetition_penalty, no_repeat_ngram_size
        self.banned = [
            torch.tensor([list(ids) for ids in banned if len(ids) == length], device=device)  # (M, length)
            for length in sorted({len(ids) for ids in banned})
        ]

    def apply(self, scores: Tensor, tokens: Tensor) -> Tensor:
        """The (R, V) scores of the next word after (R, t) tokens; a copy where a rule says anything."""
        early = tokens.shape[1] < self.min_tokens
        if self.repetition_penalty == 1 and not (self.no_repeat_ngram_size or self.banned or early):
            return scores
        scores = scores.clone()
        if self.repetition_penalty != 1:
            said = scores.gather(1, tokens)  # (R, t)
            said = torch.where(said < 0, said * self.repetition_penalty, said / self.repetition_penalty)
            scores.scatter_(1, tokens, said)
        size = self.no_repeat_ngram_size
        if 0 < size <= tokens.shape[1]:
            grams = tokens.unfold(1, size, 1)  # (R, t - size + 1, size)
            latest = tokens[:, None, tokens.shape[1] - size + 1 :]  # (R, 1, size - 1)
            _forbid(scores, grams[..., -1], where=(grams[..., :-1] == latest).all(dim=-1))
        for sequences in self.banned:
            before = sequences.shape[1] - 1
            if before <= tokens.shape[1]:
                latest = tokens[:, None, tokens.shape[1] - before :]  # (R, 1, before)
                words = sequences[:, -1].expand(len(tokens), -1)  # (R, M)
                _forbid(scores, words, where=(sequences[None, :, :-1] == latest).all(dim=-1))
        if early:
            scores[:, self.eos_id] = -math.inf
        return scores


def _forbid(scores: Tensor, words: Tensor, *, where: Tensor) -> None:
    """Forbid the (R, M) words where (R, M) is true; a word may be named more than once."""
    limit = torch.where(where, -math.inf, math.inf).to(scores.dtype)
    scores.scatter_reduce_(1, words, limit, "amin")
