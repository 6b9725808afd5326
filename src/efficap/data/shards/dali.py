"""NVIDIA DALI as a decoder: encoded pictures in, uint8 squares out, batches ahead of their use.

B pictures, S: image_size.

The pipeline is fed, and reads no file itself: its own webdataset reader fails a whole batch for one broken picture, and
often without a name.
"""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from efficap.data.pictures import Picture
from efficap.data.transforms import Crop, EvaluationTransform, Resized, TrainingTransform
from efficap.errors import InputError

AHEAD = 2  # batches begun before they are asked for

Cut = Crop | Resized


class DaliDecoder:
    """The squares of batches of encoded pictures: an iterator, a few batches ahead of its use.

    In training only the part of a picture that is cut out is decoded: the same pixels, to the last bit, as cutting it
    from the whole, and for most JPEGs in much less time. On a GPU DALI resizes too. On a CPU torchvision does: faster
    than DALI, and to the last bit what a table of the same pictures gives.

    Args:
        batches: encoded pictures and their cuts, B of each; read `AHEAD` batches before their squares are asked for.
        transform: whose squares they are; its cuts say whether this is training.
        batch_size: the largest B.
        num_threads: of the decoder.
        device: where the squares are wanted; a CUDA device decodes there.

    Raises:
        InputError: DALI is not installed.
    """

    def __init__(
        self,
        batches: Iterator[tuple[Sequence[bytes], Sequence[Cut]]],
        transform: TrainingTransform | EvaluationTransform,
        *,
        batch_size: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self.transform, self.device = transform, device
        self._cuts: deque[Sequence[Cut]] = deque()
        training, on_gpu = isinstance(transform, TrainingTransform), device.type == "cuda"
        # What DALI needs to know of a batch: without a GPU it neither resizes nor mirrors.
        inputs = (4 if training else 3) if on_gpu else (3 if training else 1)
        sizes = np.int32 if training else np.float32
        feed = (_inputs(batch, sizes)[:inputs] for batch in self._noted(batches))
        self._pipeline = _build(
            feed,
            inputs,
            training,
            transform.image_size,
            transform.interpolation.value,
            batch_size,
            num_threads,
            device,
        )
        self._copy: Any = importlib.import_module("nvidia.dali.plugin.pytorch").feed_ndarray

    def _noted(
        self, batches: Iterator[tuple[Sequence[bytes], Sequence[Cut]]]
    ) -> Iterator[tuple[Sequence[bytes], Sequence[Cut]]]:
        for batch in batches:
            self._cuts.append(batch[1])
            yield batch

    def __iter__(self) -> DaliDecoder:
        return self

    def __next__(self) -> Tensor:
        """The (B, 3, S, S) uint8 squares of the next batch, on the device.

        Raises:
            RuntimeError: one of its pictures cannot be decoded; the decoder is then of no more use.
        """
        self._pipeline.schedule_run()
        (pictures,) = self._pipeline.share_outputs()  # StopIteration after the last
        cuts, size = self._cuts.popleft(), self.transform.image_size
        squares = torch.empty(len(cuts), 3, size, size, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            self._copy(pictures.as_tensor(), squares, cuda_stream=stream)
        else:
            for square, picture, cut in zip(squares, pictures, cuts, strict=True):
                pixels = from_dlpack(picture).permute(2, 0, 1)  # (3, H, W), in DALI's own memory
                square.copy_(self.transform.square(pixels, cut))  # type: ignore[arg-type]
        self._pipeline.release_outputs()
        return squares


def _inputs(batch: tuple[Sequence[bytes], Sequence[Cut]], size_type: type) -> tuple[Any, ...]:
    """Encoded pictures, (B, 2) corners, (B, 2) heights and widths, (B,) whether they are mirrored."""
    encoded, cuts = batch
    return (
        [np.frombuffer(data, np.uint8) for data in encoded],
        np.array([(cut.top, cut.left) for cut in cuts], np.int32),
        np.array([(cut.height, cut.width) for cut in cuts], size_type),
        np.array([isinstance(cut, Crop) and cut.flip for cut in cuts], np.int32),
    )


def _build(
    feed: Iterator[tuple[Any, ...]],
    inputs: int,
    training: bool,
    size: int,
    interpolation: str,
    batch_size: int,
    num_threads: int,
    device: torch.device,
) -> Any:
    try:
        dali: Any = importlib.import_module("nvidia.dali")  # its stubs do not know what is used here
        fn: Any = importlib.import_module("nvidia.dali.fn")
    except ImportError as error:
        raise InputError(
            f"data=webdataset needs NVIDIA DALI, which cannot be loaded here ({error}): "
            "pip install nvidia-dali-cuda120 (Linux on x86-64), or read a table with data=csv"
        ) from error
    types = dali.types
    on_gpu = device.type == "cuda"
    filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    resize = {"interp_type": filters[interpolation], "antialias": True}

    def squares() -> Any:
        given = fn.external_source(source=feed, num_outputs=inputs, ndim=[1, 1, 1, 0][:inputs])
        encoded, (corner, extent, flip) = given[0], [*given[1:], None, None, None][:3]
        whole = {"device": "mixed" if on_gpu else "cpu", "output_type": types.RGB}
        whole["jpeg_fancy_upsampling"] = True  # on a GPU, too: edges of colours as libjpeg has them
        if training:
            part = {"start": corner, "shape": extent, "axis_names": "HW"}
            pictures = fn.decoders.image_slice(encoded, **part, **whole)
        else:
            pictures = fn.decoders.image(encoded, **whole)
        if not on_gpu:
            return pictures  # (H, W, 3)
        if training:
            pictures = fn.flip(fn.resize(pictures, size=[size, size], **resize), horizontal=flip)
        else:
            # Across, then down, rounded and clipped in between, as Pillow and torchvision do: in one go, DALI keeps
            # the overshoot of bicubic weights, and bright edges differ by up to 8 grey levels.
            pictures = fn.resize(pictures, resize_x=extent[1], mode="stretch", **resize)
            pictures = fn.resize(pictures, resize_y=extent[0], mode="stretch", **resize)
            pictures = fn.slice(pictures, start=corner, shape=[size, size], axis_names="HW")
        return fn.transpose(pictures, perm=[2, 0, 1])  # (3, S, S)

    pipeline: Any = dali.pipeline_def(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device.index or 0 if on_gpu else None,
        prefetch_queue_depth=AHEAD,
    )(squares)()
    pipeline.build()
    return pipeline


def decodable(picture: Picture) -> bytes:
    """A picture that DALI cannot decode as one that it can: uncompressed, upright, RGB (a PPM).

    Raises:
        PictureError: Pillow cannot decode it either.
    """
    pixels = picture.pixels()  # (3, H, W)
    header = f"P6 {picture.width} {picture.height} 255\n".encode()
    return header + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
