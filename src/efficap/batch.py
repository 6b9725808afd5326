"""The one contract between data and model.

B images, K captions of each, T tokens (the longest caption of the batch, BOS and EOS counted).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Images with K captions each; every loader yields it, and losses take nothing else.

    Attributes:
        images: (B, 3, H, W) uint8, RGB as decoded and cropped; the encoder normalises them. With
            data.feature_cache (B, C, h, w) bfloat16, the feature maps that the frozen encoder made of them.
        tokens: (B, K, T) int64, each caption ``BOS w1 … wn EOS`` and then padding.
        lengths: (B, K) int64, valid tokens with BOS and EOS; 0 where an image has fewer than K captions.
        image_ids: B keys, unique in their split.
        references: every reference text of each image; None in training.
        places: (n,) int64, ascending: in the flattened (B, K, T - 1) inputs ``tokens[..., :-1]``, those that have a
            next token. Found where the batch is made, as a device that is asked for their number must be waited for.
    """

    images: Tensor
    tokens: Tensor
    lengths: Tensor
    image_ids: list[str]
    references: list[list[str]] | None = None
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64), repr=False)

    def __post_init__(self) -> None:
        if not len(self.places):
            object.__setattr__(self, "places", next_token_places(self.lengths, self.tokens.shape[2]))
        assert self.images.ndim == 4, self.images.shape
        assert self.images.dtype in (torch.uint8, torch.bfloat16), self.images.dtype
        assert self.images.dtype == torch.bfloat16 or self.images.shape[1] == 3, self.images.shape
        assert self.tokens.ndim == 3
        assert self.lengths.shape == self.tokens.shape[:2]
        assert len(self.images) == len(self.tokens) == len(self.image_ids)
        assert self.references is None or len(self.references) == len(self.image_ids)

    def __len__(self) -> int:
        return len(self.image_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> CaptionBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            lengths=self.lengths.to(device, non_blocking=non_blocking),
            places=self.places.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> CaptionBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return replace(
            self,
            images=self.images.pin_memory(),
            tokens=self.tokens.pin_memory(),
            lengths=self.lengths.pin_memory(),
            places=self.places.pin_memory(),
        )

    @property
    def targets(self) -> Tensor:
        """(n,) int64, the token after each of `places`."""
        return self.tokens[..., 1:].flatten()[self.places]


def next_token_places(lengths: Tensor, longest: int) -> Tensor:
    """Of captions (B, K) long, padded to `longest`, the places of those tokens that another one follows: (n,)."""
    positions = torch.arange(longest - 1, device=lengths.device)
    return (positions < lengths[..., None] - 1).flatten().nonzero()[:, 0]
