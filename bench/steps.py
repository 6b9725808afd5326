"""The training steps that are measured: efficap's without Lightning, and the plain way's.

Nothing is set here before torch is loaded; whoever starts the process does that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from plain import MODELS, Plain, build

from efficap.batch import CaptionBatch
from efficap.commands.placement import used_precision
from efficap.training.losses import batch_loss
from efficap.training.optim import build_optimizer

PICTURES = {"small": 8, "medium": 8, "b0": 32}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIMIZER = {
    "betas": (0.9, 0.98),
    "eps": 1e-8,
    "weight_decay": 0.05,
    "layer_decay": 1.0,
    "warmup_steps": 10,
    "final_lr": 0.01,
}


@dataclass(frozen=True)
class Case:
    """What is trained: K captions of each picture, in float32 or under bfloat16 autocast; ours compiled, too.

    Where the CPU does not compute in bfloat16, ours is in float32 anyway, as in a training.
    """

    model: str
    captions: int
    dtype: str
    pictures: int
    compile: bool = False

    @property
    def precision(self) -> str:
        """Lightning's name of what is asked for."""
        return "bf16-mixed" if self.dtype == "bf16" else "32-true"


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(DEVICE, torch.bfloat16) if precision == "bf16-mixed" else contextlib.nullcontext()


def batch_for(case: Case) -> CaptionBatch:
    torch.manual_seed(1)
    sizes = MODELS[case.model]
    size, shape = sizes["image_size"], (case.pictures, case.captions)
    if (
        case.model == "b0"
    ):  # Flickr8k's captions: 13 tokens in the mean with BOS and EOS, the longest about 30
        lengths = torch.distributions.LogNormal(2.52, 0.3).sample(shape).round().clamp(6, 32).long()
    else:
        lengths = torch.full(shape, 20)
    tokens = torch.randint(0, sizes["vocab_size"], (*shape, int(lengths.max())))
    images = torch.randint(0, 256, (case.pictures, 3, size, size), dtype=torch.uint8)
    return CaptionBatch(images, tokens, lengths, [str(n) for n in range(case.pictures)]).to(DEVICE)


class Ours:
    """efficap's step without Lightning; `parts` is given the seconds of each part."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case, self.captioner = case, build(case.model).train().to(DEVICE)
        if case.compile:
            self.captioner.compile_parts()
        lr = dict.fromkeys(("encoder", "bridge", "decoder"), 1e-4)
        self.optimizer, self.schedule = build_optimizer(
            self.captioner, lambda _: 0.0, lr=lr, fused=True, **OPTIMIZER
        )
        self.batch = batch_for(case)
        self.precision = used_precision({"accelerator": "auto", "precision": case.precision})

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision):
            loss = batch_loss(self.captioner, self.batch, label_smoothing=0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.captioner.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def plain_step(case: Case) -> Callable[[], None]:
    """A step of the plain way: pictures one caption each, all logits, Adam as it comes."""
    model = Plain(build(case.model).train(), MODELS[case.model]["encoder"]).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    batch = batch_for(case)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(case.precision):
            loss = model.loss(batch.images, batch.tokens[:, 0], batch.lengths[:, 0], 0.1)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wait()

    return step


def seconds(step: Callable[[], Any], times: int = 1) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return (time.perf_counter() - start) / times


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
