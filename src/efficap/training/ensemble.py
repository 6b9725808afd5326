"""Several captioners as one: each sees a picture in its own size, and the probabilities of words are averaged.

B images, M models, P bytes of a picture in all the sizes that the models take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efficap.decoding import Decoding
from efficap.decoding.ensemble import AveragedStep
from efficap.errors import InputError
from efficap.models.captioner import CaptionModel
from efficap.models.pretrained.onnx_runtime import PICTURES, OnnxCaptioner
from efficap.training.memory import pictures_that_fit


@dataclass(frozen=True, slots=True)
class Member:
    """A model of an ensemble.

    Attributes:
        captioner: the model.
        square: which of the forms that a picture is given in is its own.
    """

    captioner: CaptionModel | OnnxCaptioner
    square: int


class Ensemble:
    """What decoding asks of a captioner, by the mean of several.

    Args:
        members: the models, which share the tokenizer.
        sides: pixels, the height and width of each form of a picture; forms of one size may differ in their crop.
    """

    def __init__(self, members: Sequence[Member], sides: Sequence[int]) -> None:
        self.members, self.sides = list(members), list(sides)

    @staticmethod
    def pack(forms: Sequence[Tensor]) -> Tensor:
        """All forms of a batch, (B, 3, side, side) uint8 each, in one (B, P), so that a batch can be cut."""
        return torch.cat([images.flatten(1) for images in forms], dim=1)  # (B, P)

    def start(self, images: Tensor, max_tokens: int, rows: int = 1) -> AveragedStep:
        """Encode packed (B, P) pictures for decoding captions of up to `max_tokens`, BOS and EOS counted.

        Args:
            rows: of a picture after the prompt; see `CaptionModel.start`.

        Raises:
            InputError: a decoder has no positions for that many.
        """
        forms = self._unpack(images)
        return AveragedStep(
            [member.captioner.start(forms[member.square], max_tokens, rows) for member in self.members]
        )

    def fill_up_to(self, pictures: int) -> None:
        """As `CaptionModel.fill_up_to`, of all members."""
        for member in self.members:
            member.captioner.fill_up_to(pictures)

    def _unpack(self, images: Tensor) -> list[Tensor]:
        parts = images.split([3 * side * side for side in self.sides], dim=1)  # of (B, 3 * side * side)
        return [
            part.unflatten(1, (3, side, side)).contiguous()  # (B, 3, side, side)
            for part, side in zip(parts, self.sides, strict=True)
        ]

    def cross_attention(self, images: Tensor, tokens: Tensor, *, rollout: bool = False) -> Tensor:
        """Raises InputError: each model looks at other places."""
        raise InputError(
            "an ensemble does not tell where it looks, as each model looks elsewhere; use one run"
        )

    def pictures_that_fit(self, decoding: Decoding, image: Tensor) -> int:
        """Pictures at a time: what fits for the largest model, shared among all, whose caches live side by side.

        Args:
            decoding: its rows and tokens count.
            image: (1, P), any packed picture, where the models lie.
        """
        forms = self._unpack(image)
        fitting = [
            PICTURES
            if isinstance(member.captioner, OnnxCaptioner)
            else pictures_that_fit(member.captioner, decoding, forms[member.square])
            for member in self.members
        ]
        return max(1, min(fitting) // len(self.members))
