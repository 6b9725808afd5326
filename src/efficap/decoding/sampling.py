"""Decoding with one row for each image: greedy, and nucleus sampling.

B images, T tokens at most, V words, S words that top_k leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.decoding.contract import Decoded, Decoding, Step, is_number, is_whole, require


class _SingleRow(Decoding):
    """One hypothesis for each image; its score is the sum of the model's log-probabilities, EOS included."""

    def _roll_out(
        self,
        step: Step,
        num_images: int,
        choose: Callable[[Tensor, int], Tensor],
        bos_id: int,
        eos_id: int,
        device: torch.device,
    ) -> Decoded:
        """Lets `choose(log_probs (B, V), length) -> (B,)` pick word after word until all captions end."""
        tokens = torch.full((num_images, self.max_tokens), eos_id, device=device)  # (B, T)
        tokens[:, 0] = bos_id
        lengths = torch.ones(num_images, dtype=torch.int64, device=device)
        scores = torch.zeros(num_images, dtype=torch.float32, device=device)
        running = torch.ones(num_images, dtype=torch.bool, device=device)

        for length in range(1, self.max_tokens):  # tokens of every running caption, BOS counted
            log_probs = self._log_probs(step(tokens[:, length - 1], None), length, eos_id)  # (B, V)
            words = choose(log_probs, length)  # (B,)
            gains = log_probs.gather(1, words[:, None])[:, 0]  # (B,)
            tokens[:, length] = torch.where(running, words, eos_id)
            scores += torch.where(running, gains, 0.0)
            lengths += running
            running &= words != eos_id
            if not running.any():
                break

        longest = int(lengths.max())
        return Decoded(tokens[:, None, :longest], lengths[:, None], scores[:, None])  # n = 1


@dataclass(frozen=True, kw_only=True)
class Greedy(_SingleRow):
    """The likeliest word at each step; the score is the sum of the caption's log-probabilities."""

    method: ClassVar[str] = "greedy"

    def _search(
        self, step: Step, image_ids: Sequence[str], bos_id: int, eos_id: int, device: torch.device
    ) -> Decoded:
        def choose(log_probs: Tensor, length: int) -> Tensor:
            return log_probs.argmax(dim=-1)

        return self._roll_out(step, len(image_ids), choose, bos_id, eos_id, device)


@dataclass(frozen=True, kw_only=True)
class Nucleus(_SingleRow):
    """Sampling from the smallest set of words that holds `top_p` of the probability.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751). Temperature comes
    first, then `top_k`, then `top_p` on what `top_k` left. An image's random numbers depend on `seed` and its
    image id alone: neither its neighbours in the batch nor the number of processes change its caption.
    The score is the sum of the model's own log-probabilities, before temperature and truncation.

    Attributes:
        temperature: divides the logits; below 1 sharpens, above 1 flattens.
        top_k: how many of the likeliest words to keep; None keeps all.
        top_p: probability to keep, in (0, 1]; 1 keeps all. The likeliest word is always kept.
        seed: another seed gives other captions.
    """

    method: ClassVar[str] = "nucleus"
    temperature: float
    top_k: int | None
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_number(self.temperature) and 0.01 <= self.temperature <= 100,
            "temperature",
            self.temperature,
            "must be a number from 0.01 to 100; use decoding=greedy for no randomness",
        )
        require(
            self.top_k is None or (is_whole(self.top_k) and self.top_k >= 1),
            "top_k",
            self.top_k,
            "must be a whole number of at least 1; use null to keep all words",
        )
        require(
            is_number(self.top_p) and 0 < self.top_p <= 1,
            "top_p",
            self.top_p,
            "must be above 0 and at most 1; use 1 to keep all words, or decoding=greedy to keep one",
        )
        require(is_whole(self.seed), "seed", self.seed, "must be a whole number; use 0 if any will do")

    def _search(
        self, step: Step, image_ids: Sequence[str], bos_id: int, eos_id: int, device: torch.device
    ) -> Decoded:
        uniform = uniform_numbers(self.seed, image_ids, self.max_tokens - 1).to(device)  # (B, T-1)

        def choose(log_probs: Tensor, length: int) -> Tensor:
            return self._draw(log_probs, uniform[:, length - 1, None])

        return self._roll_out(step, len(image_ids), choose, bos_id, eos_id, device)

    def _draw(self, log_probs: Tensor, uniform: Tensor) -> Tensor:
        """Words (B,) by inverse CDF over the nucleus, at `uniform` (B, 1) of its probability."""
        ranked, words = log_probs.sort(dim=-1, descending=True, stable=True)  # (B, V)
        ranked, words = ranked[:, : self.top_k], words[:, : self.top_k]  # (B, S)
        probs = ((ranked - ranked[:, :1]) / self.temperature).softmax(dim=-1)
        upto = probs.cumsum(dim=-1)
        before = F.pad(upto[:, :-1], (1, 0))  # probability of the likelier words
        nucleus = (before < self.top_p) & (probs > 0)  # (B, S) true, then false
        last = (nucleus.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
        target = uniform * upto.gather(1, last)
        place = (upto <= target).sum(dim=-1, keepdim=True)
        place = torch.minimum(place, last)  # a parallel cumsum may round to a sequence that is not monotone
        return words.gather(1, place)[:, 0]


def uniform_numbers(seed: int, keys: Sequence[str], count: int) -> Tensor:
    """(B, count) float32 in [0, 1) on the CPU; row b is a function of `seed` and ``keys[b]`` alone.

    SHAKE-128 gives the bits: the same on every machine, and a larger `count` only adds numbers.
    """
    bits = b"".join(
        hashlib.shake_128(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest(4 * count) for key in keys
    )
    integers = torch.frombuffer(bytearray(bits), dtype=torch.int32).view(len(keys), count)
    return (integers & 0xFFFFFF).float() / 2**24  # 24 bits: what a float32 in [0, 1) holds exactly
