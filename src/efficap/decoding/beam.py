"""Batched beam search, plain or in diverse groups.

B images, g groups of w beams each (n = g * w), m live rows of each group (1 at the first step, w afterwards),
k hypotheses of each group, T tokens at most, V words. A pool is a group of an image: B * g of them, image-major.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
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
from efficap.decoding.hypotheses import Hypotheses
from efficap.decoding.rules import Rules


@dataclass(frozen=True, kw_only=True)
class Beam(Decoding):
    """Beam search; a caption's score is ``sum(log p) / generated_length ** length_penalty``.

    The length normalisation is the first factor of Wu et al. 2016 (arXiv:1609.08144, section 7) without its
    constants. Result and score are those of transformers' beam search with the same settings, so published
    settings carry over. A caption's generated length counts EOS but neither BOS nor a prefix.

    Groups are those of Vijayakumar et al. 2018 (arXiv:1610.02424): each searches for itself, but a word that earlier
    groups have taken at the same step costs it `diversity_penalty` for each of their beams that took it.

    Attributes:
        num_beams: hypotheses kept for each image; 1 is greedy decoding, but for "never", which searches on, and for a
            repetition penalty, which weighs log-probabilities here and logits there, as in transformers.
        length_penalty: exponent; above 0 favours long captions, below 0 short ones, 0 sums log-probabilities.
        early_stopping: when an image with `num_beams` finished captions is done. True: at once. False: when
            the best running hypothesis, scored at its present length, is no better than the worst of them
            (likely, but not certain, to stay so). "never": when it would be no better even if it grew, at no
            cost, to the length that the penalty likes best.
        num_return_sequences: captions of each image, the best first; one that several groups have found comes again
            only after all others.
        num_beam_groups: groups that the beams are shared out to; 1 is plain beam search.
        diversity_penalty: in nats, at most 100; with one group it must be 0.
    """

    method: ClassVar[str] = "beam"
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int
    num_beam_groups: int
    diversity_penalty: float

    def __post_init__(self) -> None:
        super().__post_init__()
        n, groups = self.num_beams, self.num_beam_groups
        require(
            is_whole(n) and n >= 1, "num_beams", n, "must be at least 1; use decoding=greedy for one beam"
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
        require(
            is_whole(self.num_return_sequences) and 1 <= self.num_return_sequences <= n,
            "num_return_sequences",
            self.num_return_sequences,
            f"must be from 1 to decoding.num_beams={n}; use more beams for more captions",
        )
        require(
            is_whole(groups) and groups >= 1 and n % groups == 0,
            "num_beam_groups",
            groups,
            f"must divide decoding.num_beams={n}; use 1 for plain beam search",
        )
        penalty = self.diversity_penalty
        require(
            is_number(penalty) and (penalty > 0) == (groups > 1),
            "diversity_penalty",
            penalty,
            "must be above 0 with decoding.num_beam_groups above 1, and 0 with one group",
        )
        require(
            penalty <= 100,
            "diversity_penalty",
            penalty,
            "must be at most 100 nats; no group then takes what an earlier one took",
        )

    def _search(self, step: Step, image_ids: Sequence[str], rules: Rules, device: torch.device) -> Decoded:
        groups, width = self.num_beam_groups, self.num_beams // self.num_beam_groups
        images, eos_id = len(image_ids), rules.eos_id
        running = Hypotheses.start(rules.prompt, images * groups, self.max_tokens, eos_id, device)
        finished = Hypotheses.blank(images * groups, width, self.max_tokens, eos_id, device)
        results = Hypotheses.blank(images, self.num_beams, self.max_tokens, eos_id, device)
        # where each image that is still searched belongs in the results
        place = torch.arange(images, device=device)
        is_open = torch.ones(images * groups, dtype=torch.bool, device=device)  # false once a pool is final
        prompt = len(rules.prompt)
        logits = read_prompt(step, rules.prompt, images, device)  # (B, V)

        for length in range(prompt, self.max_tokens):  # tokens of every running hypothesis, BOS counted
            log_probs = logits.float().log_softmax(dim=-1)  # (rows, V)
            if length == prompt and groups > 1:
                log_probs = log_probs.repeat_interleave(groups, dim=0)  # (B*g, V)
            running, finished, parents = self._extend(running, finished, log_probs, length, is_open, rules)
            is_open &= self._may_improve(running, finished, length + 1 - prompt, prompt)
            open_images = is_open.view(-1, groups).any(dim=1)  # (B,)
            still = int(open_images.sum())
            last = length + 1 == self.max_tokens or not still
            keep = None
            if last or (len(open_images) - still) * 8 >= len(open_images):  # copying what stays has its price
                closed = torch.ones_like(open_images) if last else ~open_images
                results.put(place[closed], finished.of_images(closed, groups))
                if last:
                    break
                keep = open_images.nonzero()[:, 0]  # (B',)
                running, finished = (h.of_pools(open_images, groups) for h in (running, finished))
                place, is_open = place[keep], is_open.view(-1, groups)[keep].flatten()
                parents = parents.view(len(open_images), -1)[keep]
            logits = step(running.tokens[..., length].flatten(), parents.flatten(), keep)  # (B*n, V)

        best = results.ranked().of_first(self.num_return_sequences)  # (B, n)
        longest = int(best.lengths.max())
        return Decoded(
            best.tokens[..., :longest],
            best.lengths,
            best.scores,
            best.gains[..., :longest],
            ended=ended(best.tokens, best.lengths, prompt, eos_id),
        )

    def _extend(
        self,
        running: Hypotheses,
        finished: Hypotheses,
        log_probs: Tensor,
        length: int,
        is_open: Tensor,
        rules: Rules,
    ) -> tuple[Hypotheses, Hypotheses, Tensor]:
        """One more word for every pool; also, for each new row, the row of the step that it continues: (B, n)."""
        groups, width = self.num_beam_groups, self.num_beams // self.num_beam_groups
        pools, rows = running.scores.shape  # B*g, m
        of_group = log_probs.view(-1, groups, rows, log_probs.shape[-1])  # (B, g, m, V)
        taken = None  # (B, V) by how many beams of the groups so far
        parts, origins = [], []
        for group in range(groups):
            mine = running.of_group(group, groups)
            costs = of_group[:, group].flatten(0, 1)  # (B*m, V)
            if taken is not None:
                costs = costs - self.diversity_penalty * taken.repeat_interleave(rows, dim=0)
            candidates, origin = self._candidates(mine, costs, length, rules)
            parts.append(candidates)
            origins.append(origin)
            if groups > 1:
                runs_on = candidates.tokens[..., length] != rules.eos_id
                takers = candidates.rescored(candidates.scores, where=runs_on).best(width)[0]
                weights = (takers.scores > -math.inf).to(of_group.dtype)  # an empty place takes nothing
                taken = of_group.new_zeros(len(of_group), of_group.shape[-1]) if taken is None else taken
                taken = taken.scatter_add(1, takers.tokens[..., length], weights)
        candidates = Hypotheses.interleaved(parts)  # k = 2w
        origin = torch.stack(origins, dim=1).flatten(0, 1)  # (B*g, 2w)

        says_eos = candidates.tokens[..., length] == rules.eos_id  # (B*g, 2w)
        ends = says_eos | (length + 1 == self.max_tokens)
        rank = torch.arange(2 * width, device=ends.device)
        enters = ends & (rank < width) & is_open[:, None]
        generated = length + 1 - len(rules.prompt)
        entries = candidates.rescored(candidates.scores / generated**self.length_penalty, where=enters)
        finished = finished.joined(entries).best(width)[0]
        running, chosen = candidates.rescored(candidates.scores, where=~says_eos).best(width)
        first = torch.arange(pools, device=origin.device)[:, None] * rows  # (B*g, 1) row of each pool's first
        if length == len(rules.prompt):
            first = first // groups  # all groups continue the one row of their image
        return running, finished, (first + origin.gather(1, chosen)).view(-1, self.num_beams)

    def _candidates(
        self, mine: Hypotheses, costs: Tensor, length: int, rules: Rules
    ) -> tuple[Hypotheses, Tensor]:
        """The 2w continuations of each pool that are weighed, the preferred first, and the rows they continue.

        Each beam ends in EOS only once, so that of 2w at least w can run on.
        """
        costs = rules.apply(costs, mine.tokens[..., :length].flatten(0, 1))
        return mine.extend(costs, length, count=2 * (self.num_beams // self.num_beam_groups))

    def _may_improve(self, running: Hypotheses, finished: Hypotheses, generated: int, prompt: int) -> Tensor:
        """(B*g,) bool: whether the running hypotheses may still change a pool's finished ones."""
        grows = self.early_stopping == "never" and self.length_penalty > 0
        length = self.max_tokens - prompt if grows else generated
        hope = running.scores[:, 0] / length**self.length_penalty  # (B*g,)
        worst = finished.scores.amin(dim=1)  # (B*g,), -inf while there are fewer than w
        may_improve: Tensor = ~(hope <= worst)  # not `>`: a NaN must live on, to be seen in the result
        if self.early_stopping is True:
            may_improve &= worst == -math.inf
        return may_improve
