"""The sequences that a beam search weighs against each other.

P pools (a beam's hypotheses of one image, or of one group of it), m live rows of each, k hypotheses of each,
T tokens at most, V words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.decoding.top import top_words


@dataclass(frozen=True, slots=True)
class Hypotheses:
    """k token sequences of each pool. A score of -inf marks an empty place, never a caption."""

    tokens: Tensor  # (P, k, T) int64, EOS beyond lengths
    gains: Tensor  # (P, k, T) float32, log-probability of each token; 0 for the prompt and beyond lengths
    lengths: Tensor  # (P, k) int64, BOS counted
    scores: Tensor  # (P, k) float32

    @classmethod
    def blank(cls, pools: int, count: int, max_tokens: int, eos_id: int, device: torch.device) -> Hypotheses:
        return cls(
            torch.full((pools, count, max_tokens), eos_id, device=device),
            torch.zeros((pools, count, max_tokens), device=device),
            torch.ones((pools, count), dtype=torch.int64, device=device),
            torch.full((pools, count), -math.inf, dtype=torch.float32, device=device),
        )

    @classmethod
    def start(
        cls, prompt: Sequence[int], pools: int, max_tokens: int, eos_id: int, device: torch.device
    ) -> Hypotheses:
        """One hypothesis of each pool, which has said the prompt."""
        blank = cls.blank(pools, 1, max_tokens, eos_id, device)
        blank.tokens[..., : len(prompt)] = torch.tensor(prompt, device=device)
        blank.scores.zero_()
        return blank

    def _map(self, function: Callable[[Tensor], Tensor]) -> Hypotheses:
        return Hypotheses(*(function(part) for part in (self.tokens, self.gains, self.lengths, self.scores)))

    def of_group(self, group: int, groups: int) -> Hypotheses:
        return self._map(lambda part: part[group::groups])

    def of_images(self, chosen: Tensor, groups: int) -> Hypotheses:
        """All hypotheses of the images chosen by (B,) bool: (images, groups * k, …)."""
        return self._map(lambda part: part.view(-1, groups, *part.shape[1:])[chosen].flatten(1, 2))

    def of_pools(self, chosen: Tensor, groups: int) -> Hypotheses:
        """The pools of the images chosen by (B,) bool."""
        return self._map(lambda part: part.view(-1, groups, *part.shape[1:])[chosen].flatten(0, 1))

    @classmethod
    def interleaved(cls, groups: list[Hypotheses]) -> Hypotheses:
        """The pools of all groups, image-major, from those of each group."""
        if len(groups) == 1:
            return groups[0]
        parts = zip(
            *((group.tokens, group.gains, group.lengths, group.scores) for group in groups), strict=True
        )
        return cls(*(torch.stack(part, dim=1).flatten(0, 1) for part in parts))

    def extend(self, costs: Tensor, length: int, count: int) -> tuple[Hypotheses, Tensor]:
        """The `count` best one-word continuations, the best first, and the rows they continue (P, count).

        Args:
            costs: (P*m, V) log-probabilities of the next word.
        """
        pools = len(self.scores)
        gains, words = top_words(costs, count)  # (P*m, c), c = count or V
        totals = (self.scores.reshape(-1, 1) + gains).view(pools, -1)  # (P, m*c)
        scores, chosen = totals.topk(min(count, totals.shape[1]))  # (P, count or fewer)
        return self.continued(words, gains, chosen, scores, length, count)

    def continued(
        self, words: Tensor, gains: Tensor, chosen: Tensor, scores: Tensor, length: int, count: int
    ) -> tuple[Hypotheses, Tensor]:
        """The chosen continuations by one word, and the rows that they continue (P, count).

        Args:
            words, gains: (P*m, c) words that may follow each row, and their log-probabilities.
            chosen: (P, count) places among the m*c continuations of a pool, or fewer: empty places fill the rest, as
                happens where the vocabulary is smaller than the beam is wide.
            scores: those of the chosen, of the same shape.
        """
        pools, each = len(self.scores), words.shape[1]
        missing = count - scores.shape[1]
        scores, chosen = F.pad(scores, (0, missing), value=-math.inf), F.pad(chosen, (0, missing))
        origin = chosen // each
        extended = replace(self._at(origin), scores=scores)
        extended.tokens[..., length] = words.view(pools, -1).gather(1, chosen)
        extended.gains[..., length] = gains.view(pools, -1).gather(1, chosen)
        extended.lengths.fill_(length + 1)
        return extended, origin

    def rescored(self, scores: Tensor, *, where: Tensor) -> Hypotheses:
        """The same sequences with `scores` (P, k), and emptied where `where` (P, k) is false."""
        return replace(self, scores=scores.masked_fill(~where, -math.inf))

    def joined(self, other: Hypotheses) -> Hypotheses:
        return Hypotheses(
            torch.cat((self.tokens, other.tokens), dim=1),
            torch.cat((self.gains, other.gains), dim=1),
            torch.cat((self.lengths, other.lengths), dim=1),
            torch.cat((self.scores, other.scores), dim=1),
        )

    def best(self, count: int) -> tuple[Hypotheses, Tensor]:
        """The `count` best, the best first, and where they were: (P, count)."""
        index = self.scores.topk(count).indices
        return self._at(index), index

    def ranked(self) -> Hypotheses:
        """All of them, the best first, but those that repeat the tokens of a better one last."""
        best = self.best(self.scores.shape[1])[0]
        same = (best.tokens[:, :, None] == best.tokens[:, None]).all(dim=-1)  # (P, k, k)
        return best._at(same.tril(-1).any(dim=-1).long().argsort(dim=1, stable=True))

    def of_first(self, count: int) -> Hypotheses:
        return self._map(lambda part: part[:, :count])

    def _at(self, index: Tensor) -> Hypotheses:
        whole = index[..., None].expand(-1, -1, self.tokens.shape[-1])
        return Hypotheses(
            self.tokens.gather(1, whole),
            self.gains.gather(1, whole),
            self.lengths.gather(1, index),
            self.scores.gather(1, index),
        )

    def put(self, places: Tensor, other: Hypotheses) -> None:
        """Write the pools of `other` to these places."""
        for mine, theirs in zip(
            (self.tokens, self.gains, self.lengths, self.scores),
            (other.tokens, other.gains, other.lengths, other.scores),
            strict=True,
        ):
            mine[places] = theirs
