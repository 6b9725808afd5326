"""Decoding in which rows do not compete: greedy, and nucleus sampling.

B images, n samples of each, T tokens at most, V words, S words that top_k leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.decoding.contract import (
    Decoded,
    Decoding,
    Step,
    ended,
    is_number,
    is_whole,
    read_prompt,
    require,
)
from efficap.decoding.rules import Rules


class _Independent(Decoding):
    """Rows that go their own ways; a caption's score is the sum of the model's log-probabilities, EOS included."""

    def _roll_out(
        self,
        step: Step,
        images: int,
        samples: int,
        choose: Callable[[Tensor, Tensor, int], Tensor],
        rules: Rules,
        device: torch.device,
    ) -> Decoded:
        """Word after word until all captions end.

        Args:
            choose: (scores (B'*n, V), place (B',), length) -> (B'*n,) words, for the images at `place`.
        """
        prompt, eos_id = len(rules.prompt), rules.eos_id
        tokens = torch.full((images, samples, self.max_tokens), eos_id, device=device)  # (B, n, T)
        tokens[..., :prompt] = torch.tensor(rules.prompt, device=device)
        gains = torch.zeros(tokens.shape, device=device)  # (B, n, T)
        running = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)  # (B, n)
        place = torch.arange(images, device=device)  # (B',) the images that are not done
        logits = read_prompt(step, rules.prompt, images, device).repeat_interleave(samples, dim=0)  # (B*n, V)

        for length in range(prompt, self.max_tokens):  # tokens of every running caption, BOS counted
            log_probs = logits.log_softmax(dim=-1)  # (B'*n, V)
            words = choose(rules.apply(logits, tokens[place, :, :length].flatten(0, 1)), place, length)
            gain = log_probs.gather(1, words[:, None]).view(-1, samples)  # (B', n)
            words, live = words.view(-1, samples), running[place]
            tokens[place, :, length] = torch.where(live, words, eos_id)
            gains[place, :, length] = torch.where(live, gain, 0.0)
            running[place] = live & (words != eos_id)
            goes_on = running[place].any(dim=1)  # (B',)
            still = int(goes_on.sum())
            if length + 1 == self.max_tokens or not still:
                break
            # Copying what stays has its price.
            keep = None if (len(place) - still) * 8 < len(place) else goes_on.nonzero()[:, 0]
            parents = self._parents(len(place), samples, first=length == prompt, keep=keep, device=device)
            place = place if keep is None else place[keep]
            logits = step(tokens[place, :, length].flatten(), parents, keep).float()

        lengths = self._lengths(tokens, prompt, eos_id)
        longest = int(lengths.max())
        tokens, gains = tokens[..., :longest], gains[..., :longest]
        return Decoded(
            tokens, lengths, gains.sum(dim=-1), gains, ended=ended(tokens, lengths, prompt, eos_id)
        )

    @staticmethod
    def _parents(
        images: int, samples: int, *, first: bool, keep: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """The rows that go on: all samples of an image from its one row at first, each from its own afterwards."""
        if keep is None and (samples == 1 or not first):
            return None
        rows = torch.arange(images if first else images * samples, device=device)
        rows = rows[:, None].expand(-1, samples) if first else rows.view(images, samples)  # (B, n)
        return (rows if keep is None else rows[keep]).flatten()

    @staticmethod
    def _lengths(tokens: Tensor, prompt: int, eos_id: int) -> Tensor:
        """(B, n) tokens of each caption with BOS and, where there is one, EOS."""
        is_end = tokens[..., prompt:] == eos_id  # (B, n, T - prompt)
        before = (is_end.cumsum(dim=-1) == 0).sum(dim=-1)
        return prompt + before + is_end.any(dim=-1)


@dataclass(frozen=True, kw_only=True)
class Greedy(_Independent):
    """The likeliest word at each step; the score is the sum of the caption's log-probabilities."""

    method: ClassVar[str] = "greedy"

    def _search(self, step: Step, image_ids: Sequence[str], rules: Rules, device: torch.device) -> Decoded:
        def choose(scores: Tensor, place: Tensor, length: int) -> Tensor:
            return scores.argmax(dim=-1)

        return self._roll_out(step, len(image_ids), 1, choose, rules, device)


@dataclass(frozen=True, kw_only=True)
class Nucleus(_Independent):
    """Sampling from the smallest set of words that holds `top_p` of the probability.

    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (arXiv:1904.09751). Temperature comes
    first, then `top_k`, then `top_p` on what `top_k` left, then `min_p`. An image's random numbers depend on `seed`
    and its image id alone: neither its neighbours in the batch nor the number of processes change its caption.
    The score is the sum of the model's own log-probabilities, before temperature and truncation.

    Attributes:
        temperature: divides the logits; below 1 sharpens, above 1 flattens.
        top_k: how many of the likeliest words to keep; None keeps all.
        top_p: probability to keep, in (0, 1]; 1 keeps all. The likeliest word is always kept.
        min_p: words less likely than this share of the likeliest one's probability are dropped, in [0, 1]; 0 keeps
            all (Nguyen et al. 2024, arXiv:2407.01082).
        num_return_sequences: samples of each image; the first is the same whatever their number.
        seed: another seed gives other captions.
    """

    method: ClassVar[str] = "nucleus"
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    num_return_sequences: int
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
        require(
            is_number(self.min_p) and 0 <= self.min_p <= 1,
            "min_p",
            self.min_p,
            "must be from 0 to 1; use 0 to keep all words",
        )
        require(
            is_whole(self.num_return_sequences) and self.num_return_sequences >= 1,
            "num_return_sequences",
            self.num_return_sequences,
            "must be at least 1",
        )
        require(is_whole(self.seed), "seed", self.seed, "must be a whole number; use 0 if any will do")

    def _search(self, step: Step, image_ids: Sequence[str], rules: Rules, device: torch.device) -> Decoded:
        samples, steps = self.num_return_sequences, self.max_tokens - 1
        uniform = uniform_numbers(self.seed, image_ids, samples * steps).to(device)
        uniform = uniform.view(-1, samples, steps)  # (B, n, T-1)

        def choose(scores: Tensor, place: Tensor, length: int) -> Tensor:
            return self._draw(scores, uniform[place, :, length - 1].flatten()[:, None])

        return self._roll_out(step, len(image_ids), samples, choose, rules, device)

    def _draw(self, scores: Tensor, uniform: Tensor) -> Tensor:
        """Words (B,) by inverse CDF over the nucleus, at `uniform` (B, 1) of its probability."""
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:
            return _inverse_cdf((scores / self.temperature).softmax(dim=-1), uniform)
        ranked, words = scores.sort(dim=-1, descending=True, stable=True)  # (B, V)
        ranked, words = ranked[:, : self.top_k], words[:, : self.top_k]  # (B, S)
        probs = ((ranked - ranked[:, :1]) / self.temperature).softmax(dim=-1)
        upto = probs.cumsum(dim=-1)
        before = F.pad(upto[:, :-1], (1, 0))  # probability of the likelier words
        likely = probs >= self.min_p * probs[:, :1]
        nucleus = (before < self.top_p) & likely & (probs > 0)  # (B, S) true, then false
        last = (nucleus.sum(dim=-1, keepdim=True) - 1).clamp(min=0)  # (B, 1)
        target = uniform * upto.gather(1, last)
        place = (upto <= target).sum(dim=-1, keepdim=True)
        place = torch.minimum(place, last)  # a parallel cumsum may round to a sequence that is not monotone
        return words.gather(1, place)[:, 0]


def _inverse_cdf(probs: Tensor, uniform: Tensor) -> Tensor:
    """Words (B,) in the order of their ids, at `uniform` (B, 1) of `probs` (B, V): nothing needs to be sorted."""
    upto = probs.cumsum(dim=-1).masked_fill(probs == 0, 0.0)  # (B, V), and what cannot come is never above
    total = upto.amax(dim=-1, keepdim=True)  # (B, 1)
    # the product may round up
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return (upto > target).byte().argmax(dim=-1)  # the first that is


def uniform_numbers(seed: int, keys: Sequence[str], count: int) -> Tensor:
    """(B, count) float32 in [0, 1) on the CPU; row b is a function of `seed` and ``keys[b]`` alone.

    SHAKE-128 gives the bits: the same on every machine, and a larger `count` only adds numbers.
    """
    bits = b"".join(
        hashlib.shake_128(f"{seed} {key}".encode("utf-8", "surrogatepass")).digest(4 * count) for key in keys
    )
    integers = torch.frombuffer(bytearray(bits), dtype=torch.int32).view(len(keys), count)
    return (integers & 0xFFFFFF).float() / 2**24  # 24 bits: what a float32 in [0, 1) holds exactly
