"""Captions of pictures: model, decoding and tokenizer joined, in as large a batch as memory allows.

B images, n captions of each, T tokens, N = h * w latent positions, L layers, H heads.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efficap.decoding import Decoding, Step
from efficap.errors import InputError
from efficap.evaluation.attention import Word
from efficap.models.captioner import CaptionModel, DecodingState, FixedDecodingState
from efficap.models.evidence import EvidentStep
from efficap.models.pretrained.onnx_runtime import PICTURES, OnnxCaptioner
from efficap.tokenizer import CaptionTokenizer
from efficap.training.ensemble import Ensemble
from efficap.training.memory import is_out_of_memory, pictures_that_fit


@dataclass(frozen=True, slots=True)
class WrittenCaption:
    """A caption and how the model came to it.

    Attributes:
        text: special tokens left out.
        score: as the decoding defines it, in nats.
        ended: whether EOS was reached; otherwise the caption was cut at max_tokens.
        tokens: its ids, BOS and EOS included.
        token_log_probs: of each of them, in nats; 0 for BOS and a prefix.
        attention: (T - 1, N) how much the step that wrote each token after BOS looked at each latent position, the mean
            over layers and heads, or (L, H, T - 1, N); None unless asked for.
    """

    text: str
    score: float
    ended: bool
    tokens: list[int]
    token_log_probs: list[float]
    attention: Tensor | None = None

    def as_row(self) -> dict[str, Any]:
        """All but the attention, for a file."""
        return {
            "text": self.text,
            "score": self.score,
            "ended": self.ended,
            "tokens": self.tokens,
            "token_log_probs": self.token_log_probs,
        }


class CaptionWriter:
    """Writes captions; where memory runs out it halves the batch, says so, and goes on with the smaller one.

    Raises:
        InputError: `decoding.evidence` where nothing is known of it.

    Attributes:
        batch_size: the largest number of pictures at a time; None until `find_batch_size` was asked for it.
        on_encoded: is told the ids and the (B, N, D) memory of pictures as a single model of torch's encodes them; of
            some again where memory ran out after it.
    """

    def __init__(
        self,
        captioner: CaptionModel | OnnxCaptioner | Ensemble,
        tokenizer: CaptionTokenizer,
        decoding: Decoding,
    ) -> None:
        _check_evidence(captioner, tokenizer, decoding)
        self.captioner, self.tokenizer, self.decoding = captioner, tokenizer, decoding
        self.batch_size = decoding.batch_size
        self.on_encoded: Callable[[list[str], Tensor], object] | None = None

    def find_batch_size(self, image: Tensor) -> int:
        """The number of pictures at a time: decoding.batch_size, or else what fits into the memory that is free now.

        Args:
            image: (1, 3, H, W), any picture of the size, where the model lies; for an ensemble as it packs them.
        """
        if self.batch_size is None:
            if isinstance(self.captioner, OnnxCaptioner):
                self.batch_size = PICTURES
            elif isinstance(self.captioner, Ensemble):
                self.batch_size = self.captioner.pictures_that_fit(self.decoding, image)
            else:
                self.batch_size = pictures_that_fit(self.captioner, self.decoding, image)
        return self.batch_size

    @torch.no_grad()
    def write(
        self,
        images: Tensor,
        image_ids: list[str],
        *,
        attention: bool = False,
        by_head: bool = False,
        rollout: bool = False,
    ) -> list[list[WrittenCaption]]:
        """The n captions of each of the (B, 3, H, W) uint8 pictures, or of packed ones.

        The best comes first; those that are drawn stay in their order.

        Args:
            image_ids: sampling draws by them.
            attention: also where each token looked; the captions are read once more for it.
            by_head: of each layer and head; otherwise their mean.
            rollout: followed through the bridge's blocks; see `CaptionModel.cross_attention`.

        Raises:
            torch.OutOfMemoryError, RuntimeError: there is no room for a single picture.
        """
        written: list[list[WrittenCaption]] = []
        while len(written) < len(images):
            size = min(self.find_batch_size(images[:1]), len(images) - len(written))
            part = slice(len(written), len(written) + size)
            try:
                written += self._write(images[part], image_ids[part], attention, by_head, rollout)
            except RuntimeError as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                self.batch_size = size // 2
                self.captioner.fill_up_to(self.batch_size)
            else:
                continue
            if images.device.type == "cuda":
                torch.cuda.empty_cache()
            print(
                f"out of memory with {size} pictures at a time; going on with {self.batch_size}",
                file=sys.stderr,
            )
        return written

    def write_loaded(
        self, loaded: list[tuple[str, Tensor | None, str]], device: torch.device, **looking: bool
    ) -> Iterator[tuple[str, list[WrittenCaption], str]]:
        """Name, captions and error of each picture that a loader gave as name, (3, H, W) pixels or None, and error.

        Args:
            looking: what `write` is to tell of where the model looked.
        """
        read = [(name, pixels) for name, pixels, _ in loaded if pixels is not None]
        written: Iterator[list[WrittenCaption]] = iter(())
        if read:
            images = torch.stack([pixels for _, pixels in read]).to(device)  # (B, 3, H, W)
            written = iter(self.write(images, [name for name, _ in read], **looking))
        for name, pixels, error in loaded:
            yield name, [] if pixels is None else next(written), error

    def _write(
        self, images: Tensor, image_ids: list[str], attention: bool, by_head: bool, rollout: bool
    ) -> list[list[WrittenCaption]]:
        decoded = self.decoding.decode(
            self._start(images, image_ids),
            image_ids,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
            device=images.device,
            vocabulary=self.tokenizer,
        )
        looks: list[list[Tensor | None]] = [[None] * decoded.tokens.shape[1]] * len(images)
        if attention:
            read = decoded.tokens[..., :-1]
            weights = self.captioner.cross_attention(
                images, read, rollout=rollout
            ).float()  # (B, n, L, H, T - 1, N)
            weights = weights if by_head else weights.mean(dim=(2, 3))
            looks = [list(of_image) for of_image in weights.cpu()]
        rows = zip(
            decoded.tokens.tolist(),
            decoded.token_log_probs.tolist(),
            decoded.lengths.tolist(),
            decoded.scores.tolist(),
            decoded.ended.tolist(),
            looks,
            strict=True,
        )
        return [
            [
                WrittenCaption(
                    self.tokenizer.decode(ids[:length]),
                    score,
                    end,
                    ids[:length],
                    gains[:length],
                    look[..., : length - 1, :] if look is not None else None,
                )
                for ids, gains, length, score, end, look in zip(*of_image, strict=True)
            ]
            for of_image in rows
        ]

    def _start(self, images: Tensor, image_ids: list[str]) -> Step:
        state = self.captioner.start(images, self.decoding.max_tokens, self.decoding.rows)
        if self.on_encoded and isinstance(state, DecodingState | FixedDecodingState):
            self.on_encoded(image_ids, state.memory)
        if not self.decoding.evidence:
            return state
        assert isinstance(state, DecodingState | FixedDecodingState)
        return EvidentStep(
            state,
            torch.from_numpy(self.tokenizer.frequencies),
            weight=self.decoding.evidence,
            max_tokens=self.decoding.max_tokens,
            bos_id=self.tokenizer.bos_id,
        )


def _check_evidence(
    captioner: CaptionModel | OnnxCaptioner | Ensemble, tokenizer: CaptionTokenizer, decoding: Decoding
) -> None:
    if not decoding.evidence:
        return
    subject = f"decoding.evidence={decoding.evidence}"
    if not isinstance(captioner, CaptionModel):
        raise InputError(
            f"{subject} takes a single run, and no ensemble or ONNX export; ++decoding.evidence=0 does without it"
        )
    if tokenizer.frequencies is None:
        raise InputError(
            f"{subject} is for a captioner that learned to tell captions unread, by training.hidden_captions in this "
            "version or a later one; ++decoding.evidence=0 does without it"
        )


def words_of(written: WrittenCaption, tokenizer: CaptionTokenizer) -> list[Word]:
    """The words of a caption, with where the model looked if it was written with its attention.

    A word in several tokens is as probable as all of them together, and looked where they did in the mean.
    """
    attention = written.attention
    if attention is not None:
        attention = attention.unflatten(-1, (math.isqrt(attention.shape[-1]), -1))  # (…, T - 1, h, w)
    return [
        Word(
            text,
            math.exp(sum(written.token_log_probs[place + 1] for place in places)),
            None if attention is None else attention[..., places, :, :].mean(dim=-3).numpy(),
        )
        for text, places in tokenizer.words(written.tokens[1:])
    ]
