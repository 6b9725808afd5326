"""Whether an export says of pictures what the run says.

B pictures of H x W pixels.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.commands.caption_folder import Pictures, find_pictures
from efficap.commands.run_dir import RunDirectory
from efficap.data.transforms import EvaluationTransform
from efficap.decoding import Beam, Decoding, Greedy
from efficap.errors import InputError
from efficap.models.build import preprocessing
from efficap.models.captioner import CaptionModel
from efficap.models.pretrained.onnx_runtime import OnnxCaptioner
from efficap.tokenizer import CaptionTokenizer
from efficap.training.writer import CaptionWriter, WrittenCaption

PICTURES = 16
BEAMS = 3


def check_pictures(run: RunDirectory, images: str | None) -> Tensor:
    """Up to 16 pictures as a run's model takes them, (B, 3, H, W) uint8.

    Args:
        images: what caption.py takes under that name; None: blots of colour, drawn from a seed.

    Raises:
        InputError: there is no picture that can be read.
    """
    if images is None:
        size = run.config["model"]["image_size"]
        blots = torch.rand(PICTURES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        blots = F.interpolate(blots, size=(size, size), mode="bicubic", align_corners=False)
        return (255 * blots.clamp(0, 1)).to(torch.uint8)
    transform = EvaluationTransform(**preprocessing(run.config["model"]))
    pictures = Pictures(find_pictures(images, "--images"), transform)
    loaded = (pictures[place][1] for place in range(len(pictures)))
    readable = list(itertools.islice((pixels for pixels in loaded if pixels is not None), PICTURES))
    if not readable:
        raise InputError(f"--images={images}: none of {len(pictures)} files is a picture that can be read")
    return torch.stack(readable)


def check_captions(
    captioner: CaptionModel,
    exported: OnnxCaptioner,
    tokenizer: CaptionTokenizer,
    max_tokens: int,
    pictures: Tensor,
    *,
    demand: bool,
) -> list[str]:
    """Caption pictures with both, greedily and with three beams; returns lines that tell what came of it.

    Args:
        max_tokens: of a caption, BOS and EOS counted.
        pictures: (B, 3, H, W) uint8.
        demand: whether all captions must be equal.

    Raises:
        InputError: they must be, and are not.
    """
    report = []
    for name, decoding in _decodings(max_tokens).items():
        ours, theirs = (
            _captions(CaptionWriter(model, tokenizer, decoding), pictures) for model in (captioner, exported)
        )
        equal = sum(a.tokens == b.tokens for a, b in zip(ours, theirs, strict=True))
        line = f"captions equal to the run's, {name}: {equal} of {len(pictures)}"
        if equal == len(pictures):
            distance = max(abs(a.score - b.score) for a, b in zip(ours, theirs, strict=True))
            line += f"; their scores differ by {distance:.1g} nats at most"
        elif demand:
            place, a, b = next((i, a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            raise InputError(
                f"the export does not reproduce the run: {line}; of picture {place + 1} the run says {a.text!r}, the "
                f"export {b.text!r}; nothing is written"
            )
        report.append(line)
    if len(pictures) > 1 and len({caption.text for caption in ours}) == 1:
        report.append(
            "the run says the same of all these pictures; --images=DIR with such as it knows checks more"
        )
    return report


def _decodings(max_tokens: int) -> dict[str, Decoding]:
    plain: dict[str, Any] = {
        "max_tokens": max_tokens,
        "min_tokens": 0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "banned": [],
        "prefix": "",
        "batch_size": PICTURES // 2,  # so that they come in more than one batch
    }
    beam = Beam(
        **plain,
        num_beams=BEAMS,
        length_penalty=1.0,
        early_stopping=False,
        num_return_sequences=1,
        num_beam_groups=1,
        diversity_penalty=0.0,
    )
    return {"greedy": Greedy(**plain), f"{BEAMS} beams": beam}


def _captions(writer: CaptionWriter, pictures: Tensor) -> list[WrittenCaption]:
    return [best for best, *_ in writer.write(pictures, [str(place) for place in range(len(pictures))])]
