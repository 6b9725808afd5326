"""What a picture alone says for a word, in decoding, beside what the words before it say.

B images, R rows of them, T tokens, V words, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from efficap.models.captioner import DecodingState, FixedDecodingState

FLOOR = 1e-3  # of a probability: below it a word counts as no more and no less likely than usual


class EvidentStep:
    """A step function whose logits are raised by the evidence of the picture for each word.

    A captioner that learned to tell captions of which it reads no word (``training.hidden_captions``; parallel
    prediction, Tschannen et al. 2023, https://arxiv.org/abs/2306.07915) says for each place how likely a word is there
    by the picture alone. The evidence is the logarithm of how much likelier that is than in any caption: the pointwise
    mutual information of word and picture.

    Args:
        state: the model's own step function.
        frequencies: (T', V) of each word at each place after BOS; later places have no evidence.
        weight: of the evidence, in nats, beside a word's log-probability.
        max_tokens: the longest caption.
    """

    def __init__(
        self,
        state: DecodingState | FixedDecodingState,
        frequencies: Tensor,
        *,
        weight: float,
        max_tokens: int,
        bos_id: int,
    ) -> None:
        self.state, self.weight = state, weight
        decoder, memory = state.decoder, state.memory
        self.frequencies = frequencies[: max_tokens - 1].to(memory.device)  # (T', V)
        unread = torch.full((len(memory), len(self.frequencies)), bos_id, device=memory.device)
        self.unread = decoder(unread, decoder.project_memory(memory))  # (B, T', D)
        self.place = 0  # after BOS, of the next word

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        """Feed each row's newest token, (R,); returns (R, V) logits. See `Step`."""
        logits = self.state(ids, parents, images).float()  # (R, V)
        if images is not None:
            self.unread = self.unread[images]
        place, self.place = self.place, self.place + 1
        if place >= len(self.frequencies):
            return logits
        seen = self.state.decoder.logits(self.unread[:, place]).float().softmax(dim=-1)  # (B, V)
        evidence = ((seen + FLOOR) / (self.frequencies[place] + FLOOR)).log()
        rows = len(logits) // len(evidence)
        return logits + self.weight * evidence.repeat_interleave(rows, dim=0)
