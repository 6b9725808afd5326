"""The two ONNX graphs of a captioner: pictures to keys and values, and one step of decoding.

B images, G rows of each, R = B * G rows, image-major; T tokens so far, N latent positions, D width, H heads of width
d, L layers, V vocabulary.

Both go through the model's own submodules, so that what changes there comes along.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficap.models.captioner import CaptionModel
from efficap.models.gpt2 import GPT2

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"
MEMORY, PAST, PRESENT = ("memory_keys", "memory_values"), ("past_keys", "past_values"), ("keys", "values")
_OPSET = 18  # the oldest that the exporter writes


class EncoderGraph(nn.Module):
    """Pictures to what every layer of the decoder reads of them."""

    def __init__(self, captioner: CaptionModel) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 -> the cross-attention's keys and values, (L, B, H, N, d) each."""
        keys, values = zip(*self.captioner.decoder.project_memory(self.captioner.encode(images)), strict=True)
        return torch.stack(keys), torch.stack(values)


class DecoderStep(nn.Module):
    """The newest token of each row, after those in the cache."""

    def __init__(self, decoder: GPT2) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, ids: Tensor, memory_keys: Tensor, memory_values: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step.

        Args:
            ids: (B, G) int64.
            memory_keys, memory_values: (L, B, H, N, d), as `EncoderGraph` gives them.
            past_keys, past_values: (L, R, H, T, d), of the tokens before; T = 0 at first.

        Returns:
            (R, V) logits of the next token, and the cache with this one, (L, R, H, T + 1, d) twice.
        """
        length = past_keys.shape[3]
        position = torch.arange(length, length + 1)
        x = self.decoder.wte(ids.flatten())[:, None] + self.decoder.wpe(position)  # (R, 1, D)
        layers = [
            _RowCache(past_keys[i], past_values[i], self.decoder.empty_slot)
            for i in range(len(self.decoder.h))
        ]
        for i, block in enumerate(self.decoder.h):
            x = x + block.attn(block.ln_1(x), layers[i])  # type: ignore[operator]
            memory = memory_keys[i], memory_values[i]  # (B, H, N, d) each: G queries of an image share them
            x = x + block.crossattention(block.ln_cross_attn(x), memory)  # type: ignore[operator]
            x = x + block.mlp(block.ln_2(x))  # type: ignore[operator]
        logits = self.decoder.logits(self.decoder.ln_f(x)[:, 0])  # (R, V)
        return logits, torch.stack([of.key for of in layers]), torch.stack([of.value for of in layers])


class _RowCache:
    """What a layer's self-attention asks of its `DecodingCache`, with every row as an image of its own.

    So no row sees another's tokens, and none needs a mask.
    """

    mask = None

    def __init__(self, key: Tensor, value: Tensor, empty_slot: bool) -> None:
        self.key, self.value, self.empty_slot = key, value, empty_slot  # (R, H, T, d) each
        self.memory = [(key, value)]  # by its length the images are counted

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.key = torch.cat([self.key, key], dim=2)  # (R, H, T + 1, d)
        self.value = torch.cat([self.value, value], dim=2)
        if self.empty_slot:
            return F.pad(self.key, (0, 0, 1, 0)), F.pad(self.value, (0, 0, 1, 0))
        return self.key, self.value


@torch.no_grad()
def export_graphs(captioner: CaptionModel, image_size: int, directory: Path) -> None:
    """Write encoder.onnx and decoder.onnx; weights of more than 2 GB lie in a file beside each.

    Args:
        captioner: on the CPU, in float32 and in evaluation mode.
        image_size: pixels, height and width of the pictures; the numbers of pictures, rows and tokens stay free.
    """
    free = torch.export.Dim.DYNAMIC
    images = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
    encoder = EncoderGraph(captioner).eval()
    _export(encoder, {"images": images}, MEMORY, [{0: free}], directory / ENCODER_FILE)
    keys, values = encoder(images)  # (L, B, H, N, d) each
    # no dimension is 1, or it is fixed
    past = keys.new_zeros(keys.shape[0], 3 * 2, keys.shape[2], 4, keys.shape[4])
    # Each a tensor of its own: the exporter takes inputs that are the same tensor for one and the same.
    inputs = {
        "ids": torch.zeros(2, 3, dtype=torch.int64),
        **dict(zip(MEMORY, (keys, values), strict=True)),
        **{name: past.clone() for name in PAST},
    }
    _export(
        DecoderStep(captioner.decoder).eval(),
        inputs,
        ("logits", *PRESENT),
        [{0: free, 1: free}, {1: free}, {1: free}, {1: free, 3: free}, {1: free, 3: free}],
        directory / DECODER_FILE,
    )


def quantize_graphs(directory: Path) -> None:
    """Turn the matrix products of exported graphs, head and bridge included, to 8-bit integers, in place.

    Weights are rounded once, each column with a scale of its own, activations as they come (onnxruntime's dynamic
    quantisation). Convolutions, embeddings and attention's own products stay as they are.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rounded = directory / "rounded"
    rounded.mkdir()
    for name in (ENCODER_FILE, DECODER_FILE):
        # the weights of a large graph; the name is kept, for the graph says it
        beside = directory / f"{name}.data"
        with _quiet():
            quantize_dynamic(
                directory / name,
                rounded / name,
                op_types_to_quantize=["MatMul"],
                weight_type=QuantType.QUInt8,  # signed weights overflow on processors without VNNI
                per_channel=True,
                use_external_data_format=beside.exists(),
            )
        beside.unlink(missing_ok=True)
    for file in rounded.iterdir():
        file.replace(directory / file.name)
    rounded.rmdir()


def _export(
    module: nn.Module,
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    free: list[dict[int, object]],
    file: Path,
) -> None:
    with _quiet():
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(file),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple(free),
            opset_version=_OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of exporter and quantiser on their own workings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
