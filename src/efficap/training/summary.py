"""What is about to be trained, before the first step: parameters, latent positions, an estimate of memory."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.training.optim import PARTS

MAX_POSITIONS = 1024
_BYTES = 4  # weights, gradients and AdamW's two moments are float32; Muon's is one


def latent_warning(captioner: CaptionModel, image_size: int) -> str | None:
    """Why the latent map is too large, if it is, and the image size to use instead."""
    height, width = captioner.encoder.grid
    if height * width <= MAX_POSITIONS:
        return None
    best = round(MAX_POSITIONS**0.5) * captioner.encoder.reduction
    return (
        f"model.image_size={image_size} gives {height} x {width} = {height * width:,} latent positions; more than "
        f"{MAX_POSITIONS:,} cost much memory and time. Use model.image_size={best} or less"
    )


def print_summary(
    captioner: CaptionModel,
    model: dict[str, Any],
    *,
    vocab_size: int,
    pictures: int,
    captions_per_image: int,
    max_tokens: int,
    batch_size: int,
    where: str,
) -> None:
    """Print what a captioner, built from the resolved configuration `model`, is and what it needs.

    Args:
        where: it is trained: the device, and how it computes.
    """
    table = Table(title="Captioner")
    table.add_column("part")
    table.add_column("is")
    for heading in ("parameters", "trained", "frozen"):
        table.add_column(heading, justify="right")
    sizes = {part: [0, 0] for part in PARTS}
    for name, parameter in captioner.named_parameters():
        sizes[name.partition(".")[0]][not parameter.requires_grad] += parameter.numel()
    decoder = model["decoder"]
    described = {
        "encoder": model["encoder"]["name"],
        "bridge": f"blocks: {model['bridge']['n_blocks']}, heads: {model['bridge']['n_heads']}",
        "decoder": f"layers: {decoder['n_layer']}, heads: {decoder['n_head']}, width: {decoder['n_embd']}",
    }
    for part, (trained, frozen) in sizes.items():
        table.add_row(part, described[part], *(f"{n:,}" for n in (trained + frozen, trained, frozen)))
    trained, frozen = (sum(column) for column in zip(*sizes.values(), strict=True))
    table.add_row("all", "", *(f"{n:,}" for n in (trained + frozen, trained, frozen)), style="bold")
    height, width = captioner.encoder.grid
    state = _BYTES * (4 * trained + frozen)
    activations = _activation_bytes(model, vocab_size, captions_per_image, max_tokens) * batch_size
    console = Console()
    console.print(table)
    console.print(
        f"{model['image_size']} x {model['image_size']} pixels, "
        f"{height} x {width} = {height * width} latent positions; vocabulary {vocab_size:,}; "
        f"{pictures:,} training pictures, {captions_per_image} captions each\n"
        f"memory, about: {state / 2**30:.2f} GiB for weights, gradients and optimiser; up to "
        f"{activations / 2**30:.2f} GiB for the activations of a batch of {batch_size} in float32, all kept\n"
        f"trained on: {where}",
        highlight=False,
    )
    if warning := latent_warning(captioner, model["image_size"]):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)


def _activation_bytes(model: dict[str, Any], vocab_size: int, captions: int, max_tokens: int) -> int:
    """What autograd keeps of one picture with all its captions: counted on a copy without storage."""
    with torch.device("meta"):
        captioner = build_model(model, vocab_size).train()
        images = torch.zeros(2, 3, model["image_size"], model["image_size"], dtype=torch.uint8)
        tokens = torch.zeros(2, captions, max_tokens - 1, dtype=torch.int64)
    own = {parameter.untyped_storage()._cdata for parameter in captioner.parameters()}
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        captioner(images, tokens).log_softmax(-1)
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) // 2
