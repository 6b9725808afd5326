"""How many pictures can be decoded at a time: what one needs, counted before any is decoded, and what is free.

R rows of a picture, T tokens at most, N latent positions, D width, L layers, V vocabulary.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from efficap.decoding import Decoding
from efficap.models.captioner import CaptionModel

MOST, MOST_ON_CPU = 128, 32  # pictures; more of them are no faster, and a batch is what a kill loses
SHARE = 0.6  # of the free memory: others use it too, and allocators leave gaps
# A residual is kept beside the layer that is counted, and keys and values are copied when pictures leave a batch.
_SPARE = 2
# float32 of each row and word: sampling sorts them and keeps ranks, probabilities and their sums
_SCORES = 10


def pictures_that_fit(captioner: CaptionModel, decoding: Decoding, image: Tensor) -> int:
    """Pictures that a share of the free memory holds while they are decoded: from 1 to 128, on a CPU to 32.

    Args:
        captioner: where it will decode, in the dtype that it will decode in.
        decoding: its rows and tokens count.
        image: (1, 3, H, W) uint8, or the (1, C, h, w) feature map of one, where the captioner lies.
    """
    room = SHARE * free_bytes(image.device)
    most = MOST_ON_CPU if image.device.type == "cpu" else MOST
    return max(1, min(most, int(room / bytes_per_picture(captioner, decoding, image))))


@torch.no_grad()
def bytes_per_picture(captioner: CaptionModel, decoding: Decoding, image: Tensor) -> int:
    """Bytes that decoding one picture like `image` takes, about; nothing is computed, and none are taken for it."""
    largest = 0

    def count(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal largest
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, Tensor)]
        taken = sum(t.numel() * t.element_size() for t in tensors)
        largest = max(largest, taken)

    encoding = _Encoding(captioner)
    own = itertools.chain(encoding.named_parameters(), encoding.named_buffers())
    # A packed weight could not be moved there.
    without_storage = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in own
    }
    hooks = [module.register_forward_hook(count) for module in captioner.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled, for a device and not for none
            memory = torch.func.functional_call(encoding, without_storage, image.to("meta"))  # (1, N, D)
    finally:
        for hook in hooks:
            hook.remove()

    _, positions, width = memory.shape
    keys_and_values = 2 * len(captioner.decoder.h) * width * memory.element_size()
    keys_and_values *= positions + decoding.rows * decoding.max_tokens
    scores = _SCORES * 4 * decoding.rows * captioner.decoder.wte.num_embeddings
    return max(_SPARE * largest, _SPARE * keys_and_values + scores)


class _Encoding(nn.Module):
    """`CaptionModel.encode` as a module's forward."""

    def __init__(self, captioner: CaptionModel) -> None:
        super().__init__()
        self.captioner = captioner

    def forward(self, images: Tensor) -> Tensor:
        return self.captioner.encode(images)


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU torch says so by the type, on a CPU by the words."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on `device`; what torch keeps of a GPU's without using it counts."""
    if device.type != "cuda":
        return free_host_bytes()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_host_bytes(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process may still take: what the machine has, or its cgroups allow, if less.

    Args:
        root: of the file system in which ``proc`` and ``sys`` lie.
    """
    return max(0, min([_available(root / "proc/meminfo"), *_left_by_cgroups(root)]))


def _available(meminfo: Path) -> int:
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.split()[0]) * 1024
    # All there is: macOS does not tell what is free.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Of the two versions of cgroups: where they lie, the limit, what is taken, and the part of that which is only a cache.
_VERSION_1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("", "memory.max", "memory.current", "inactive_file")


def _left_by_cgroups(root: Path) -> list[int]:
    """Bytes that each group around this process has left, where it has a limit."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return []
    left = []
    for line in membership.read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        below, limit, taken, cache = _VERSION_1 if controllers else _VERSION_2
        group = Path(own.lstrip("/"))
        for folder in (group, *group.parents):
            place = root / "sys/fs/cgroup" / below / folder
            try:
                most = (place / limit).read_text().strip()
                if most != "max":
                    stat = dict(entry.split() for entry in (place / "memory.stat").read_text().splitlines())
                    left.append(int(most) - int((place / taken).read_text()) + int(stat[cache]))
            except (OSError, KeyError):  # a container sees its own group at the top, and not its path there
                continue
    return left
