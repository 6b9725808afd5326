"""Whether a model reads its memory: the loss of people's captions with their picture, and with another one.

B = 1 image, K captions of it, T tokens, N positions of the memory, D width.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from efficap.batch import next_token_places
from efficap.evaluation.grounding import SEED, exchanged
from efficap.models.captioner import CaptionModel
from efficap.ranks import to_first
from efficap.tokenizer import CaptionTokenizer
from efficap.training.losses import memory_loss


class Losses(NamedTuple):
    """Of some pictures, in the same order, the loss of their captions in nats a token.

    Attributes:
        own: read with the memory of their picture.
        other: read with that of another picture.
    """

    own: list[float]
    other: list[float]


class GapProbe:
    """Keeps the memories of some pictures as they are encoded for captioning, so that none is encoded twice.

    Which they are depends on their names alone: the same are kept whoever encodes them, and in whatever order.

    Args:
        captioner: the model, in evaluation mode.
        tokenizer: its tokenizer.
        pictures: at most as many are kept, each as likely as any other; 0 keeps none. A picture of `small` takes half a
            megabyte of the main memory.
        max_tokens: of a caption, as in training.
    """

    def __init__(
        self, captioner: CaptionModel, tokenizer: CaptionTokenizer, *, pictures: int, max_tokens: int
    ) -> None:
        self.captioner, self.tokenizer = captioner, tokenizer
        self.pictures, self.max_tokens = pictures, max_tokens
        self._kept: dict[str, Tensor] = {}  # image id -> (N, D)
        self._order: list[
            tuple[bytes, str]
        ] = []  # the kept by the digest of their names; the last goes first

    def keep(self, image_ids: Sequence[str], memory: Tensor) -> None:
        """Take from (B, N, D) the memories to keep; of a picture that comes again nothing is taken."""
        for image_id, own in zip(image_ids, memory, strict=True):
            digest = hashlib.blake2b(f"{SEED} {image_id}".encode(errors="surrogatepass")).digest()
            is_full = len(self._order) >= self.pictures
            if image_id in self._kept or (is_full and (digest, image_id) > max(self._order[-1:], default=())):
                continue
            if is_full:
                del self._kept[self._order.pop()[1]]
            bisect.insort(self._order, (digest, image_id))
            self._kept[image_id] = own.to("cpu", copy=True)

    def gather(self) -> None:
        """Let the first process have what all have kept, as if it had encoded all pictures."""
        for part in to_first(self._kept):
            self.keep(list(part), torch.stack(list(part.values())) if part else torch.empty(0))

    @torch.no_grad()
    def losses(self, references: Mapping[str, Sequence[str]]) -> Losses:
        """The losses of the kept pictures that have references; none where those are fewer than two."""
        image_ids = [image_id for image_id, texts in references.items() if texts and image_id in self._kept]
        if len(image_ids) < 2:
            return Losses([], [])
        other_of = exchanged(image_ids)
        return Losses(
            [self._loss(references[own], self._kept[own]) for own in image_ids],
            [self._loss(references[own], self._kept[other_of[own]]) for own in image_ids],
        )

    def _loss(self, captions: Sequence[str], memory: Tensor) -> float:
        device = self.captioner.decoder.wte.weight.device
        encoded, _ = self.tokenizer.encode(captions, self.max_tokens)
        rows = [torch.tensor(ids, device=device) for ids in encoded]
        tokens = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_id)[None]  # (1, K, T)
        lengths = torch.tensor([list(map(len, encoded))], device=device)  # (1, K)
        places = next_token_places(lengths, tokens.shape[2])
        targets = tokens[..., 1:].flatten()[places]
        loss = memory_loss(
            self.captioner, memory[None].to(device), tokens[..., :-1], places, targets, label_smoothing=0.0
        )
        return float(loss)
