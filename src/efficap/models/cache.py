"""What decoding keeps of the tokens so far.

B images, G rows of each (beams or samples), R = B * G rows, image-major; N positions of the memory, H heads of width d,
L layers, S slots.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]

STEPS = 8  # that a cache makes room for at a time


class DecodingCache:
    """Keys and values of the tokens so far, and of the memory, for decoding one token at a time.

    What was written stays where it is, in slots of its picture that all its rows share; which of them a row sees is its
    history. So beams change their parents without a copy of keys and values. Attention takes all slots there are, those
    to come behind the mask: a part of them would be copied for each of its matrix products.

    Args:
        memory: for each layer the (B, H, N, d) keys and values of the pictures, shared by the rows of each.
        max_tokens: the longest sequence; more room is made as it grows.
        empty_slot: whether all rows see one more slot before the first token, whose key and value are zero.
    """

    def __init__(self, memory: list[KeyValue], max_tokens: int, empty_slot: bool = False) -> None:
        self.memory = [(key.contiguous(), value.contiguous()) for key, value in memory]
        self.max_tokens = max_tokens
        self.length = 0  # tokens of each row
        self.rows = 1  # G
        # (B, 1, G, S), -inf where a row does not see; None: all see all slots in use.
        self.mask: Tensor | None = None
        images, heads, _, d = memory[0][0].shape
        self._used = int(empty_slot)  # slots
        self._keys = memory[0][0].new_zeros(len(memory), images, heads, self._used, d)  # (L, B, H, S, d)
        self._values = torch.zeros_like(self._keys)
        self._visible = self._keys.new_ones(images, 1, self._used, dtype=torch.bool)  # (B, G, S)

    def follow(self, parents: Tensor, images: Tensor | None) -> None:
        """Row r now continues what was row parents[r].

        Args:
            parents: (R,) rows of the last step.
            images: places of the pictures that go on; None: all. The rows are theirs, image-major.
        """
        if images is not None:
            self.memory = [(key[images], value[images]) for key, value in self.memory]
            self._keys, self._values = (buffer[:, images] for buffer in (self._keys, self._values))
            self._visible = self._visible[images]
        own = parents.view(len(self._visible), -1) % self.rows  # (B, G)
        self.rows = own.shape[1]
        self._visible = self._visible.gather(1, own[..., None].expand(-1, -1, self._visible.shape[2]))

    def _slots(self) -> int:
        """How many there should be, S, for those in use."""
        return math.ceil(self._used / (STEPS * self.rows)) * STEPS * self.rows

    def _grow(self) -> None:
        more = self._slots() - self._keys.shape[3]
        if more > 0:
            self._keys, self._values = (
                F.pad(buffer, (0, 0, 0, more)) for buffer in (self._keys, self._values)
            )
            self._visible = F.pad(self._visible, (0, more))

    def positions(self, tokens: int) -> Tensor:
        """(tokens,) int64, the places in their sequence of the newest tokens, once there is room for them."""
        return torch.arange(self.length - tokens, self.length, device=self._keys.device)

    def advance(self, tokens: int) -> None:
        """Make room for the next `tokens` of each row; more than one only at the start, where there is one row."""
        assert tokens == 1 or (self.rows == 1 and self.length == 0)
        start, self._used = self._used, self._used + tokens * self.rows
        self.length += tokens
        self._grow()
        if self.rows == 1:
            self._visible[:, :, start : self._used] = True
            self.mask = None
            return
        self._visible[:, :, start : self._used] = torch.eye(
            self.rows, dtype=torch.bool, device=self._visible.device
        )
        self.mask = self._hide_unseen()

    def _hide_unseen(self) -> Tensor:
        unseen = ~self._visible[:, None]  # (B, 1, G, S)
        return self._keys.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Write the (B, H, G*T, d) of the newest tokens; returns the layer's (B, H, slots, d) that `mask` is for."""
        newest = slice(self._used - key.shape[2], self._used)
        self._keys[layer, :, :, newest] = key
        self._values[layer, :, :, newest] = value
        slots = self._used if self.mask is None else self._keys.shape[3]
        return self._keys[layer, :, :, :slots], self._values[layer, :, :, :slots]


class FixedCache(DecodingCache):
    """A cache whose steps have the same shapes once the prompt is read, so that one compiled step serves them all.

    All slots that the longest sequence takes are there as soon as the rows are known. Where the newest tokens go is a
    tensor, for a number would be compiled into the step. Pictures do not leave.
    """

    def _slots(self) -> int:
        return self._used + self.rows * (self.max_tokens - self.length)

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        device = self._keys.device
        self._newest = torch.arange(self._used - tokens * self.rows, self._used, device=device)  # (G*T,)
        self._positions = super().positions(tokens)
        if self.mask is None:  # a single row sees the slots in use alone, too, since all are taken
            self.mask = self._hide_unseen()

    def positions(self, tokens: int) -> Tensor:
        return self._positions

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        self._keys[layer].index_copy_(2, self._newest, key)
        self._values[layer].index_copy_(2, self._newest, value)
        return self._keys[layer], self._values[layer]
