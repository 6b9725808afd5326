"""The decodings that are measured: efficap's beam search, transformers' `generate`, and the floor of both.

Nothing is set here before torch is loaded; whoever starts the process does that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from plain import MODELS, Plain, build
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.utils import logging

from efficap.decoding import Beam
from efficap.models.captioner import CaptionModel

VOCABULARY = 50_257
END = VOCABULARY - 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """What is decoded.

    Attributes:
        tokens: of every caption, BOS counted; with random weights none ends by itself.
        ends: captions end after 8 to 16 tokens, as people's do.
    """

    model: str = "small"
    pictures: int = 8
    beams: int = 5
    tokens: int = 20
    dtype: str = "float32"
    ends: bool = False

    def end_of(self, picture: int) -> int:
        """The length at which EOS becomes certain."""
        return 8 + picture * 5 % 9 if self.ends else self.tokens + 1


def build_random(case: Case) -> CaptionModel:
    """A captioner of random weights whose cross-attention and positions matter to what it says."""
    torch.manual_seed(0)
    captioner = build(case.model)
    for block in captioner.decoder.h:
        nn.init.normal_(block.crossattention.c_proj.weight, std=0.1)  # type: ignore[union-attr]
    nn.init.normal_(captioner.decoder.wpe.weight, std=0.3)
    return captioner.eval().to(DEVICE, getattr(torch, case.dtype))


def random_images(case: Case) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (case.pictures, 3, 224, 224), dtype=torch.uint8, device=DEVICE)


def theirs(plain: Plain, images: Tensor, case: Case) -> Tensor:
    """The (B, T) best captions by `generate`."""

    def ends(ids: Tensor, scores: Tensor) -> Tensor:
        due = [row for row in range(len(ids)) if ids.shape[1] >= case.end_of(row // case.beams)]
        scores[due, END] = 0.0
        return scores

    return plain.generate(
        images,
        bos_id=END,
        eos_id=END,
        num_beams=case.beams,
        max_length=case.tokens,
        length_penalty=1.0,
        logits_processor=LogitsProcessorList([ends] if case.ends else []),
    )


def generate_for(case: Case) -> Callable[[], Any]:
    """`theirs`, ready to run; returns the tokens as lists."""
    logging.set_verbosity_error()
    plain, images = Plain(build_random(case), MODELS[case.model]["encoder"]), random_images(case)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            tokens: list[list[int]] = theirs(plain, images, case).tolist()
        return tokens

    return run


def ours(captioner: CaptionModel, images: Tensor, case: Case) -> Tensor:
    """The (B, T) best captions."""
    beam = Beam(
        max_tokens=case.tokens,
        min_tokens=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        banned=[],
        prefix="",
        num_beams=case.beams,
        length_penalty=1.0,
        early_stopping=False,
        num_return_sequences=1,
        num_beam_groups=1,
        diversity_penalty=0.0,
        batch_size=None,
    )
    step = captioner.start(images, case.tokens)
    places, length = list(range(len(images))), 0

    def ending(ids: Tensor, parents: Tensor | None, kept: Tensor | None) -> Tensor:
        nonlocal places, length
        places, length = places if kept is None else [places[place] for place in kept.tolist()], length + 1
        logits = step(ids, parents, kept)
        if case.ends:
            each = len(ids) // len(places)
            rows = [n for n in range(len(ids)) if length >= case.end_of(places[n // each])]
            logits[rows, END] = logits[rows].float().logsumexp(-1).to(logits.dtype) + 20
        return logits

    names = [str(picture) for picture in range(len(images))]
    return beam.decode(ending, names, bos_id=END, eos_id=END, device=DEVICE).tokens[:, 0]


class Floor:
    """The encoder, the bridge, and the matrix products that this decoding cannot do without."""

    def __init__(self, captioner: CaptionModel, case: Case) -> None:
        self.captioner = captioner
        decoder = captioner.decoder
        layers = [module for module in decoder.h.modules() if isinstance(module, nn.Linear)]
        self.memory = [block.crossattention.c_attn for block in decoder.h]  # type: ignore[union-attr]
        skipped = {id(layer) for layer in self.memory}
        self.linears = [layer for layer in layers if id(layer) not in skipped]
        dtype = decoder.wte.weight.dtype
        alive = [
            sum(case.end_of(picture) >= length for picture in range(case.pictures))
            for length in range(1, case.tokens)
        ]
        self.rows = [count * (1 if step == 0 else case.beams) for step, count in enumerate(alive) if count]
        self.inputs = {
            (rows, layer.in_features): torch.randn(rows, layer.in_features, dtype=dtype, device=DEVICE)
            for rows in set(self.rows)
            for layer in self.linears
        }

    def __call__(self, images: Tensor) -> None:
        memory = self.captioner.encode(images)
        head = self.captioner.decoder.wte.weight
        for layer in self.memory:
            layer(memory)
        for rows in self.rows:
            for layer in self.linears:
                layer(self.inputs[rows, layer.in_features])
            F.linear(self.inputs[rows, head.shape[1]], head)
