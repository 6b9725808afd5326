"""Batched beam search.

B images, n beams of each, m live rows of each (1 at the first step, n afterwards), k hypotheses of each,
T tokens at most, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.decoding.contract import Decoded, Decoding, Step, is_number, is_whole, require


@dataclass(frozen=True, kw_only=True)
class Beam(Decoding):
    """Beam search; a caption's score is ``sum(log p) / generated_length ** length_penalty``.

    The length normalisation is the first factor of Wu et al. 2016 (arXiv:1609.08144, section 7) without its
    constants. Result and score are those of transformers' beam search with the same settings, so published
    settings carry over. A caption's generated length counts EOS but not BOS.

    Attributes:
        num_beams: hypotheses kept for each image; 1 is greedy decoding (but for "never", which searches on).
        length_penalty: exponent; above 0 favours long captions, below 0 short ones, 0 sums log-probabilities.
        early_stopping: when an image with `num_beams` finished captions is done. True: at once. False: when
            the best running hypothesis, scored at its present length, is no better than the worst of them
            (likely, but not certain, to stay so). "never": when it would be no better even if it grew, at no
            cost, to the length that the penalty likes best.
    """

    method: ClassVar[str] = "beam"
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_whole(self.num_beams) and self.num_beams >= 1,
            "num_beams",
            self.num_beams,
            "must be at least 1; use decoding=greedy for one beam",
        )
        require(
            is_number(self.length_penalty) and abs(self.length_penalty) <= 10,
            "length_penalty",
            self.length_penalty,
            "must be a number from -10 to 10; use 0 for sums and 1 for means of log-probabilities",
        )
        require(
            isinstance(self.early_stopping, bool) or self.early_stopping == "never",
            "early_stopping",
            self.early_stopping,
            "must be true, false or never; use false to keep searching while a better caption is likely",
        )

    def _search(
        self, step: Step, image_ids: Sequence[str], bos_id: int, eos_id: int, device: torch.device
    ) -> Decoded:
        running = _Hypotheses.blank(len(image_ids), 1, self.max_tokens, eos_id, device)
        running.tokens[..., 0] = bos_id
        running.scores.zero_()
        finished = _Hypotheses.blank(len(image_ids), self.num_beams, self.max_tokens, eos_id, device)
        # (B,), false once an image's finished captions are final
        is_open = torch.ones(len(image_ids), dtype=torch.bool, device=device)
        rank = torch.arange(2 * self.num_beams, device=device)
        parents = None

        for length in range(1, self.max_tokens):  # tokens of every running hypothesis, BOS counted
            logits = step(running.tokens[..., length - 1].flatten(), parents)  # (B*m, V)
            log_probs = self._log_probs(logits, length, eos_id)
            # Each beam ends in EOS only once, so that of 2n candidates at least n can run on.
            candidates, origin = running.extend(log_probs, length, count=2 * self.num_beams)  # k = 2n

            says_eos = candidates.tokens[..., length] == eos_id  # (B, 2n)
            ends = says_eos | (length + 1 == self.max_tokens)
            enters = ends & (rank < self.num_beams) & is_open[:, None]  # (B, 2n)
            entries = candidates.rescored(candidates.scores / length**self.length_penalty, where=enters)
            finished = finished.joined(entries).best(self.num_beams)[0]

            rows = running.scores.shape[1]  # m
            running, chosen = candidates.rescored(candidates.scores, where=~says_eos).best(self.num_beams)
            parents = _flat_rows(origin.gather(1, chosen), rows)  # (B*n,)
            is_open &= self._may_improve(running, finished, length)
            if not is_open.any():
                break

        longest = int(finished.lengths[:, 0].max())
        return Decoded(finished.tokens[:, :1, :longest], finished.lengths[:, :1], finished.scores[:, :1])

    def _may_improve(self, running: _Hypotheses, finished: _Hypotheses, generated: int) -> Tensor:
        """(B,) bool: whether the running hypotheses may still change an image's finished ones."""
        grows = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens - 1 if grows else generated
        hope = running.scores[:, 0] / length**self.length_penalty  # (B,)
        worst = finished.scores.amin(dim=1)  # (B,), -inf while there are fewer than n
        may_improve: Tensor = ~(hope <= worst)  # not `>`: a NaN must live on, to be seen in the result
        if self.early_stopping is True:
            may_improve &= worst == -math.inf
        return may_improve


@dataclass(frozen=True, slots=True)
class _Hypotheses:
    """k token sequences of each image. A score of -inf marks an empty place, never a caption."""

    tokens: Tensor  # (B, k, T) int64, EOS beyond lengths
    lengths: Tensor  # (B, k) int64, BOS counted
    scores: Tensor  # (B, k) float32

    @classmethod
    def blank(
        cls, images: int, count: int, max_tokens: int, eos_id: int, device: torch.device
    ) -> _Hypotheses:
        return cls(
            torch.full((images, count, max_tokens), eos_id, device=device),
            torch.ones((images, count), dtype=torch.int64, device=device),
            torch.full((images, count), -math.inf, dtype=torch.float32, device=device),
        )

    def extend(self, log_probs: Tensor, length: int, count: int) -> tuple[_Hypotheses, Tensor]:
        """The `count` best one-word continuations, the best first, and the rows they continue (B, count)."""
        images, rows = self.scores.shape
        vocabulary = log_probs.shape[-1]
        totals = self.scores[..., None] + log_probs.view(images, rows, vocabulary)  # (B, m, V)
        scores, flat = totals.flatten(1).topk(min(count, rows * vocabulary))  # (B, count or fewer)
        missing = count - scores.shape[1]  # above 0 only for a vocabulary smaller than the beam is wide
        scores, flat = F.pad(scores, (0, missing), value=-math.inf), F.pad(flat, (0, missing))  # (B, count)
        origin = flat // vocabulary
        extended = replace(self._at(origin), scores=scores)
        extended.tokens[..., length] = flat % vocabulary
        extended.lengths.fill_(length + 1)
        return extended, origin

    def rescored(self, scores: Tensor, *, where: Tensor) -> _Hypotheses:
        """The same sequences with `scores` (B, k), and emptied where `where` (B, k) is false."""
        return replace(self, scores=scores.masked_fill(~where, -math.inf))

    def joined(self, other: _Hypotheses) -> _Hypotheses:
        return _Hypotheses(
            torch.cat((self.tokens, other.tokens), dim=1),
            torch.cat((self.lengths, other.lengths), dim=1),
            torch.cat((self.scores, other.scores), dim=1),
        )

    def best(self, count: int) -> tuple[_Hypotheses, Tensor]:
        """The `count` best, the best first, and where they were: (B, count)."""
        index = self.scores.topk(count).indices
        return self._at(index), index

    def _at(self, index: Tensor) -> _Hypotheses:
        tokens = self.tokens.gather(1, index[..., None].expand(-1, -1, self.tokens.shape[-1]))
        return _Hypotheses(tokens, self.lengths.gather(1, index), self.scores.gather(1, index))


def _flat_rows(index: Tensor, rows: int) -> Tensor:
    """Rows within each image (B, n), out of `rows`, as rows of the batch (B*n,)."""
    first = torch.arange(len(index), device=index.device)[:, None] * rows  # (B, 1)
    return (first + index).flatten()
