"""Beam search for captions that contain required words.

B images, m live rows of each, w beams, c candidates of each row, C phrases, S spellings of each, V words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.decoding.beam import Beam
from efficap.decoding.contract import Vocabulary, is_phrases, require
from efficap.decoding.hypotheses import Hypotheses
from efficap.decoding.phrases import NEVER, NONE, Phrases
from efficap.decoding.rules import Rules, forbid
from efficap.decoding.top import top_words


@dataclass(frozen=True, kw_only=True)
class Constrained(Beam):
    """Beam search in which every caption says each required phrase, whatever the model thinks of it.

    Dynamic beam allocation of Post & Vilar 2018 (arXiv:1804.06609): besides the likeliest words, the next word of each
    missing phrase is a candidate for each beam, and the beams are shared out among banks, one for each number of
    required tokens said. A caption does not end while something is missing; when the room that is left is what the
    missing tokens need, only they may come.

    A phrase counts as said where its tokens follow each other as the tokenizer spells them, so "dog" may come as part
    of "dogs". Required words are exempt from `no_repeat_ngram_size`; banned phrases stay banned, and a word after which
    a required phrase would be a banned one does not come before that phrase.

    Attributes:
        required: words and phrases that every caption has; [] is plain beam search. `num_beams` should exceed the
            number of their tokens, so that each bank has a beam.

    Raises:
        InputError: there are groups, or, when decoding begins, a phrase is banned or `max_tokens` leaves no room.
    """

    method: ClassVar[str] = "constrained"
    required: Sequence[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            is_phrases(self.required),
            "required",
            self.required,
            "must be a list of words or phrases; [] asks for none",
        )
        require(
            not self.required or self.num_beam_groups == 1,
            "num_beam_groups",
            self.num_beam_groups,
            "must be 1 with decoding.required; use required=[] for diverse groups",
        )

    def _rules(self, bos_id: int, eos_id: int, device: torch.device, vocabulary: Vocabulary | None) -> Rules:
        rules = super()._rules(bos_id, eos_id, device, vocabulary)
        if not self.required:
            return rules
        assert vocabulary is not None, "words cannot be spelled"
        spellings = [
            self._spellings(phrase, vocabulary, rules)
            for phrase in dict.fromkeys(map(str.strip, self.required))
        ]
        phrases = Phrases(spellings, rules.banned_ids, bos_id=bos_id, device=device)
        prompt = torch.tensor([rules.prompt], device=device)
        need = int(phrases.outlook(prompt, phrases.begun(prompt), phrases.said(prompt)))
        require(
            need < NEVER,
            "required",
            list(self.required),
            "must not say what decoding.banned forbids where one phrase follows another or the prefix; "
            "list them in another order or ban less",
        )
        require(
            need == 0 or len(rules.prompt) + need < self.max_tokens,
            "required",
            list(self.required),
            f"must leave room in decoding.max_tokens={self.max_tokens}: with BOS, prefix and EOS it takes "
            f"{len(rules.prompt) + need + 1} tokens; raise max_tokens or require less",
        )
        rules.required = phrases
        return rules

    @staticmethod
    def _spellings(phrase: str, vocabulary: Vocabulary, rules: Rules) -> list[list[int]]:
        first, *others = vocabulary.usual_spellings(phrase)
        require(
            rules.eos_id not in first, "required", repr(phrase), "must be words; the end of a text is none"
        )
        require(
            not rules.bans_part_of(first),
            "required",
            repr(phrase),
            "must not be banned; take it out of decoding.required or what it says out of decoding.banned",
        )
        return [first, *(ids for ids in others if not rules.bans_part_of(ids))]

    def _candidates(
        self, mine: Hypotheses, costs: Tensor, length: int, rules: Rules
    ) -> tuple[Hypotheses, Tensor]:
        phrases = rules.required
        if phrases is None:
            return super()._candidates(mine, costs, length, rules)
        pools = len(mine.scores)
        tokens = mine.tokens[..., :length].flatten(0, 1)  # (B*m, t)
        said = phrases.said(tokens)  # (B*m, C)
        needed = phrases.needed(phrases.begun(tokens), said).flatten(1)  # (B*m, C*S)
        costs = rules.apply(costs, tokens, exempt=needed)
        words, gains = self._words(costs, needed, ~said.all(dim=1), rules.eos_id)  # (B*m, c)
        progress, fits = self._outlook(phrases, tokens, said, words)
        totals = (mine.scores.reshape(-1, 1) + gains).masked_fill(~fits, -math.inf)
        totals, progress = totals.view(pools, -1), progress.view(pools, -1)  # (B, m*c)
        chosen = _share_out(totals, progress, phrases.size)[:, : 2 * self.num_beams]  # (B, 2w)
        scores = totals.gather(1, chosen)
        # Of those that run on, only the first w have a beam; the search itself would take the likeliest.
        runs_on = words.view(pools, -1).gather(1, chosen) != rules.eos_id
        scores = scores.masked_fill(runs_on & (runs_on.cumsum(dim=1) > self.num_beams), -math.inf)
        return mine.continued(words, gains, chosen, scores, length, count=2 * self.num_beams)

    def _words(self, costs: Tensor, needed: Tensor, misses: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
        """Words that may follow each row, none twice, and their log-probabilities: (B*m, c), c = C*S + 2w.

        Args:
            costs: (B*m, V) log-probabilities of the next word.
            needed: (B*m, C*S) words that missing phrases need next.
            misses: (B*m,) bool: something is missing, so that EOS may not come.
        """
        same = (needed[:, :, None] == needed[:, None]).tril(-1)  # (B*m, C*S, C*S)
        is_word = (needed != NONE) & ~same.any(dim=-1)
        needed = needed.clamp(min=0)
        gains = costs.gather(1, needed).masked_fill(~is_word, -math.inf)
        costs = costs.clone()
        forbid(costs, needed, where=is_word)  # they are candidates already
        costs[:, eos_id] = costs[:, eos_id].masked_fill(misses, -math.inf)
        likely_gains, likely = top_words(costs, 2 * self.num_beams)
        return torch.cat((needed, likely), dim=1), torch.cat((gains, likely_gains), dim=1)

    def _outlook(
        self, phrases: Phrases, tokens: Tensor, said: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of each row with each of its words, (B*m, c): required tokens said, and whether the others have room."""
        each = words.shape[1]
        recent, begun, said = phrases.extend(
            tokens.repeat_interleave(each, dim=0), said.repeat_interleave(each, dim=0), words.flatten()
        )
        progress = phrases.progress(begun, said).view_as(words)
        length = tokens.shape[1] + 1
        if length + phrases.most < self.max_tokens and not phrases.collides:
            return progress, torch.ones_like(words, dtype=torch.bool)
        need = phrases.outlook(recent, begun, said).view_as(words)
        return progress, (need == 0) | (length + need < self.max_tokens)  # one place is for EOS


def _share_out(scores: Tensor, banks: Tensor, last: int) -> Tensor:
    """The order (B, n) in which candidates get a beam: the best of each bank, the second of each, and so on.

    The fullest bank comes first in each round; empty places, whose score is -inf, come last.

    Args:
        scores: (B, n)
        banks: (B, n) from 0 to `last`.
    """
    order = scores.argsort(dim=1, descending=True)
    banks, is_empty = banks.gather(1, order), scores.gather(1, order) == -math.inf
    members = F.one_hot(banks, last + 1).cumsum(dim=1)  # (B, n, banks)
    rank = members.gather(2, banks[..., None])[..., 0]  # (B, n) in its bank, from 1
    turn = (rank * (last + 1) + last - banks).masked_fill(is_empty, NEVER)
    return order.gather(1, turn.argsort(dim=1, stable=True))
