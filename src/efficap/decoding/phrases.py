"""How far token sequences are in saying what they must: a function of their tokens, whole rows at a time.

N sequences of t tokens, C phrases, S spellings of each, L tokens of the longest spelling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NONE = -1  # no word
BEFORE = -2  # where a sequence has not begun
NEVER = 1 << 30  # tokens: more than any caption has


class Phrases:
    """What every caption must say.

    Args:
        spellings: of each phrase, any of which says it. One that begins with BOS begins a caption; the first of a
            phrase may come anywhere.
        banned: sequences that never come. None of them is part of a spelling, but a spelling may end one that other
            words began: "dog" where "hot dog" is banned.

    Attributes:
        size: tokens of all phrases, by their first spellings.
        most: never less than the tokens that it takes to say what is missing.
        collides: whether any spelling may end a banned sequence.
    """

    def __init__(
        self,
        spellings: Sequence[Sequence[Sequence[int]]],
        banned: Sequence[Sequence[int]],
        *,
        bos_id: int,
        device: torch.device,
    ) -> None:
        ways = max(map(len, spellings))
        # To fill the table, a phrase repeats its first spelling, which changes nothing.
        table = [[*phrase, *[phrase[0]] * (ways - len(phrase))] for phrase in spellings]
        self.longest = max(len(ids) for phrase in spellings for ids in phrase)
        self.ids = torch.tensor(
            [[[*ids, *[NONE] * (self.longest - len(ids))] for ids in phrase] for phrase in table],
            device=device,
        )  # (C, S, L)
        self.lengths = (self.ids != NONE).sum(dim=-1)  # (C, S)
        self.bos_id = bos_id
        self.sizes = self.lengths[:, 0]  # (C,)
        self.size = int(self.sizes.sum())
        self.most = len(table) * self.longest
        colliding = [ids for ids in banned if any(_runs_into(ids, own) for ways in spellings for own in ways)]
        self._colliding = [torch.tensor(list(ids), device=device) for ids in colliding]
        self._memory = max([self.longest, *map(len, colliding)])
        self.collides = bool(colliding)

    def said(self, tokens: Tensor) -> Tensor:
        """(N, C) bool: whether the (N, t) tokens contain a spelling of each phrase."""
        windows = F.pad(tokens, (0, self.longest - 1), value=BEFORE).unfold(1, self.longest, 1)  # (N, t, L)
        equal = windows[:, :, None, None] == self.ids  # (N, t, C, S, L)
        return (equal | (self.ids == NONE)).all(dim=-1).any(dim=-1).any(dim=1)

    def begun(self, tokens: Tensor) -> Tensor:
        """(N, C, S): how many tokens of each spelling the (N, t) end with."""
        begun = torch.zeros((len(tokens), *self.lengths.shape), dtype=torch.int64, device=tokens.device)
        for count in range(1, min(self.longest, tokens.shape[1]) + 1):
            latest = tokens[:, None, None, tokens.shape[1] - count :]  # (N, 1, 1, count)
            equal = (latest == self.ids[..., :count]).all(dim=-1) & (count <= self.lengths)
            begun.masked_fill_(equal, count)
        return begun

    def needed(self, begun: Tensor, said: Tensor) -> Tensor:
        """(N, C, S) the next word of each spelling of what is missing, begun or not; `NONE` for what was said."""
        place = begun.clamp(max=self.longest - 1)[..., None]  # (N, C, S, 1)
        words = self.ids.expand(len(begun), -1, -1, -1).gather(-1, place)[..., 0]  # (N, C, S)
        # A spelling for a caption's beginning cannot begin any more: the phrase's first is the way.
        words = torch.where(words == self.bos_id, words[..., :1], words)
        return words.masked_fill(said[..., None], NONE)

    def extend(self, recent: Tensor, said: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One word more: the latest tokens of each sequence, what it has begun and what it has said.

        Args:
            recent: (N, t) tokens, or the latest of them.
            said: (N, C) of the sequences so far.
            words: (N,)
        """
        recent = torch.cat((recent, words[:, None]), dim=1)[:, -self._memory :]
        begun = self.begun(recent)
        return recent, begun, said | (begun == self.lengths).any(dim=-1)

    def progress(self, begun: Tensor, said: Tensor) -> Tensor:
        """(N,) tokens of the phrases that were said, those of a phrase that is under way included; up to `size`."""
        own = begun - (self.ids[..., 0] == self.bos_id).long()  # BOS is nobody's word
        under_way = own.amax(dim=-1).clamp(min=0).minimum(self.sizes)  # (N, C)
        return torch.where(said, self.sizes, under_way).sum(dim=-1)

    def outlook(self, recent: Tensor, begun: Tensor, said: Tensor) -> Tensor:
        """(N,) tokens that it takes to say what is missing, by a plan; `NEVER` where that says a banned sequence.

        The plan goes on with the phrase that is furthest under way, or else begins the first that is missing. What it
        does next depends on the sequence alone, so a sequence that does as planned has one token less to go: as long as
        one hypothesis keeps to what its room allows, it has a continuation that does, whatever the model says.
        """
        taken = torch.zeros(len(said), dtype=torch.int64, device=said.device)
        while bool((missing := ~said.all(dim=-1)).any()):
            words = self.needed(begun, said).flatten(1)  # (N, C*S)
            places = torch.arange(words.shape[1], 0, -1, device=words.device)
            order = begun.flatten(1) * words.shape[1] + places  # no two are equal: the first of the furthest
            chosen = order.masked_fill(words == NONE, 0).argmax(dim=1, keepdim=True)
            recent, begun, said = self.extend(recent, said, words.gather(1, chosen)[:, 0])
            taken += missing * torch.where(self._collision(recent), NEVER, 1)
        return taken

    def _collision(self, recent: Tensor) -> Tensor:
        hit = torch.zeros(len(recent), dtype=torch.bool, device=recent.device)
        for ids in self._colliding:
            if len(ids) <= recent.shape[1]:
                hit |= (recent[:, -len(ids) :] == ids).all(dim=-1)
        return hit


def _runs_into(banned: Sequence[int], spelling: Sequence[int]) -> bool:
    """Whether the end of a banned sequence is the beginning of a spelling."""
    shorter = min(len(banned), len(spelling))
    return any(list(banned[-count:]) == list(spelling[:count]) for count in range(1, shorter + 1))
