"""A captioner that onnxruntime computes, on the CPU, from what `efficap.models.pretrained.onnx_graphs` wrote.

B images, G rows of each, R = B * G rows, image-major; T tokens so far, N latent positions, H heads of width d,
L layers, V vocabulary.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficap.errors import InputError
from efficap.models.pretrained.onnx_graphs import DECODER_FILE, ENCODER_FILE, MEMORY, PAST, PRESENT

PICTURES = 16  # at a time, where nobody says how many: what they take is the runtime's own affair
Array = NDArray[np.float32]


class OnnxCaptioner:
    """What decoding asks of a `CaptionModel`, from a directory that holds encoder.onnx and decoder.onnx.

    It computes with as many threads as torch has.

    Args:
        directory: of the export.
        n_positions: tokens that the decoder has positions for.
        vocab_size: V, of the export's tokenizer.

    Raises:
        InputError: onnxruntime is not installed, or a file is missing, damaged or another model's.
    """

    def __init__(self, directory: Path, *, n_positions: int, vocab_size: int) -> None:
        self.encoder = _session(directory / ENCODER_FILE)
        self.decoder = _session(directory / DECODER_FILE)
        self.n_positions = n_positions
        outputs = {output.name: output.shape for output in self.decoder.get_outputs()}
        inputs = {given.name: given.shape for given in self.decoder.get_inputs()}
        if not (outputs.keys() >= {"logits", *PRESENT} and inputs.keys() >= {"ids", *MEMORY, *PAST}):
            raise InputError(
                f"{directory / DECODER_FILE} is no decoder that efficap exported; export it again"
            )
        if outputs["logits"][-1] != vocab_size:
            raise InputError(
                f"{directory / DECODER_FILE} writes {outputs['logits'][-1]} words, but the tokenizer beside it has "
                f"{vocab_size}; export the run again"
            )

    def start(self, images: Tensor, max_tokens: int, rows: int = 1) -> OnnxDecodingState:
        """Encode (B, 3, H, W) uint8 pictures for decoding captions of up to `max_tokens`, BOS and EOS counted.

        Args:
            rows: of a picture; the graphs take any number.

        Raises:
            InputError: the decoder has no positions for that many.
        """
        if max_tokens > self.n_positions:
            raise InputError(
                f"decoding.max_tokens={max_tokens} is more than the decoder's "
                f"model.decoder.n_positions={self.n_positions}"
            )
        memory = _run(self.encoder, MEMORY, {"images": images.numpy(force=True)})
        return OnnxDecodingState(self.decoder, memory)

    def fill_up_to(self, pictures: int) -> None:
        """Nothing: batches are not filled up."""

    def cross_attention(self, images: Tensor, tokens: Tensor, *, rollout: bool = False) -> Tensor:
        """Raises InputError: the graphs keep to themselves where the decoder looks."""
        raise InputError("an ONNX export does not tell where it looks; use the run that it was made from")


class OnnxDecodingState:
    """The step function that `efficap.decoding` drives.

    Args:
        decoder: the session of decoder.onnx.
        memory: keys and values of the pictures, (L, B, H, N, d) each.
    """

    def __init__(self, decoder: Any, memory: list[Array]) -> None:
        self.decoder, self.memory = decoder, memory
        layers, images, heads, _, d = memory[0].shape
        self.past = [np.zeros((layers, images, heads, 0, d), dtype=np.float32)] * 2  # (L, R, H, T, d) each

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None = None) -> Tensor:
        """Feed each row's newest token, (R,); returns (R, V) logits. See `efficap.decoding.Step`."""
        if images is not None:
            self.memory = [_picked(part, images) for part in self.memory]
        if parents is not None:
            self.past = [_picked(part, parents) for part in self.past]
        newest = ids.numpy(force=True).reshape(self.memory[0].shape[1], -1)  # (B, G)
        feed = dict(zip((*MEMORY, *PAST), (*self.memory, *self.past), strict=True))
        logits, *self.past = _run(self.decoder, ("logits", *PRESENT), {"ids": newest, **feed})
        return torch.from_numpy(logits)


def _picked(part: Array, places: Tensor) -> Array:
    """(L, X, H, ·, d) at some places of X; `take` lays it out as onnxruntime reads it, indexing does not."""
    return part.take(places.numpy(force=True), axis=1)


def _run(session: Any, outputs: tuple[str, ...], feed: dict[str, NDArray[Any]]) -> list[Array]:
    try:
        return list(session.run(outputs, feed))
    except Exception as error:  # kinds of its own; the writer takes fewer pictures where this tells of memory
        raise RuntimeError(f"onnxruntime: {error}") from error


def require_package(name: str) -> Any:
    """A package of the extra ``onnx``.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"ONNX needs {name}, which is not installed: pip install 'efficap[onnx]'") from error


def _session(file: Path) -> Any:
    runtime = require_package("onnxruntime")
    if not file.is_file():
        raise InputError(f"{file} does not exist; export the run again")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    # A thread that spins while it waits holds up others where cores are shared, as torch's do (commands/entry.py).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # kinds of its own
        raise InputError(
            f"{file} cannot be loaded ({' '.join(str(error).split())}); export it again"
        ) from error
