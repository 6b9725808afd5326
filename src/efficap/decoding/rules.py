"""Which words may come next, given those so far: what transformers calls logits processors.

R rows, t tokens of each so far, V words, M sequences of one length, E words that are exempt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from efficap.decoding.phrases import Phrases


class Rules:
    """Applied to the scores of the next word: log-probabilities in beam search, logits elsewhere, as transformers does.

    Args:
        prompt: BOS, and the ids of a prefix.
        eos_id: forbidden while a sequence has fewer than `min_tokens` tokens, BOS counted.
        repetition_penalty: divides the positive and multiplies the negative scores of words that were said (Keskar et
            al. 2019, arXiv:1909.05858); 1 changes nothing.
        no_repeat_ngram_size: no sequence of so many tokens comes twice (Paulus et al. 2018, arXiv:1705.04304); 0: any.
            EOS repeats nothing, though BOS may have the same id.
        banned: sequences of ids that never come.

    Attributes:
        required: what a caption must say; None: nothing. `Constrained` sets and obeys it.
    """

    required: Phrases | None = None

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
        self.banned_ids = [list(ids) for ids in banned]
        self.banned = [
            torch.tensor([ids for ids in self.banned_ids if len(ids) == length], device=device)  # (M, length)
            for length in sorted(set(map(len, self.banned_ids)))
        ]

    def bans_part_of(self, ids: Sequence[int]) -> bool:
        """Whether `ids` contain a banned sequence."""
        parts = {tuple(ids[i:j]) for i in range(len(ids)) for j in range(i + 1, len(ids) + 1)}
        return any(tuple(banned) in parts for banned in self.banned_ids)

    def apply(self, scores: Tensor, tokens: Tensor, exempt: Tensor | None = None) -> Tensor:
        """The (R, V) scores of the next word after (R, t) tokens; a copy where a rule says anything.

        Args:
            exempt: (R, E) words that may repeat a sequence of `no_repeat_ngram_size`.
        """
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
            repeats = (grams[..., :-1] == latest).all(dim=-1) & (grams[..., -1] != self.eos_id)
            if exempt is not None:
                repeats &= ~(grams[..., -1:] == exempt[:, None]).any(dim=-1)
            forbid(scores, grams[..., -1], where=repeats)  # (R, t - size + 1)
        for sequences in self.banned:
            before = sequences.shape[1] - 1
            if before <= tokens.shape[1]:
                latest = tokens[:, None, tokens.shape[1] - before :]  # (R, 1, before)
                words = sequences[:, -1].expand(len(tokens), -1)  # (R, M)
                forbid(scores, words, where=(sequences[None, :, :-1] == latest).all(dim=-1))
        if early:
            scores[:, self.eos_id] = -math.inf
        return scores


def forbid(scores: Tensor, words: Tensor, *, where: Tensor) -> None:
    """Forbid the (R, M) words where (R, M) is true; a word may be named more than once."""
    limit = torch.where(where, -math.inf, math.inf).to(scores.dtype)
    scores.scatter_reduce_(1, words, limit, "amin")
