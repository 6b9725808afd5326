"""What decoding adds to a process's memory; bench/decode.py starts it with ours or generate, and a case."""

from __future__ import annotations

import ctypes
import json
import sys

import torch
from decoders import DEVICE, Case, build_random, ours, random_images, theirs
from plain import MODELS, Plain
from transformers.utils import logging

from efficap.models.fold import fold_norms


def peak_memory(way: str, case: Case) -> float:
    """MiB that decoding adds to a process that has the weights and has encoded once.

    By Linux's high-water mark, or the allocator's of a GPU.
    """
    captioner = build_random(case)
    if way == "ours":
        fold_norms(captioner.encoder.backbone)
        captioner.pack_weights()
    plain = Plain(captioner, MODELS[case.model]["encoder"]) if way == "generate" else None
    images = random_images(case)
    with torch.inference_mode():
        captioner.encode(images)
        before = _begin_peak()
        if plain is None:
            ours(captioner, images, case)
        else:
            theirs(plain, images, case)
        peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE == "cuda" else _status("VmHWM")
        return peak - before


def _begin_peak() -> float:
    """Forget the high-water mark; returns the MiB that are taken now."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what encoding has freed is not to be used again unseen
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return before


def _status(key: str) -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(key))


if __name__ == "__main__":
    logging.set_verbosity_error()
    print(peak_memory(sys.argv[1], Case(**json.loads(sys.argv[2]))))
