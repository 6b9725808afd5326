"""A training step: efficap against what a user would write with timm and transformers, in one run, in pairs.

    python bench/train_step.py [--models small,b0] [--dtypes bf16,fp32] [--captions 5,1] [--pictures N] [--compile]

The plain way sees a picture once for each caption; efficap sees it once for all K. Sizes are `small`'s at 224 pixels,
8 pictures, captions of 20 tokens; and those of a model that trains from nothing on a small set: EfficientNet-B0 at
128 pixels, a decoder of 4 layers and width 256, 32 pictures, captions as long as Flickr8k's. Random weights and
pictures, no loader. Each has a process of its own, efficap's with what its commands set there. bf16 is what a user asks
for: on a CPU that does not compute in bfloat16 torch emulates it for the plain way, and efficap takes float32. Ratios
are of image-caption pairs a second. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

if __name__ == "__main__":  # and not in the plain way's process
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as efficap sets it, before torch is loaded

import lightning.pytorch as pl
import torch
from apart import Apart
from plain import MODELS, Plain, build
from steps import DEVICE, OPTIMIZER, PICTURES, Case, Ours, autocast, batch_for, plain_step, seconds, wait
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from efficap.batch import CaptionBatch
from efficap.commands.entry import tune_process
from efficap.decoding import Greedy
from efficap.models.linear import bfloat16_is_slow
from efficap.training.losses import batch_loss, caption_loss
from efficap.training.module import CaptionModule

WARM = 3  # steps, of which the first compile kernels and the next still find new memory
PEAK = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}  # dense bfloat16, by NVIDIA's data sheets


def differences(model: str) -> dict[str, float]:
    """How far loss and gradients of the two ways are apart, float32, K = 1, relative to the largest gradient."""
    torch.manual_seed(0)
    captioner = build(model).eval().to(DEVICE)  # BatchNorm rounds with the layout of its input
    for block in captioner.decoder.h:
        torch.nn.init.normal_(block.crossattention.c_proj.weight, std=0.02)  # type: ignore[union-attr]
    plain = Plain(captioner, MODELS[model]["encoder"]).eval().to(DEVICE)
    batch = batch_for(Case(model, 1, "fp32", PICTURES[model]))
    mine = batch_loss(captioner, batch, label_smoothing=0.0)
    theirs = plain.loss(batch.images, batch.tokens[:, 0], batch.lengths[:, 0])
    mine.backward()  # type: ignore[no-untyped-call]
    theirs.backward()  # type: ignore[no-untyped-call]
    found = {"loss": abs((mine - theirs).item())}
    pairs = {
        "encoder": (captioner.encoder.backbone, plain.encoder),
        "bridge": (captioner.bridge, plain.bridge),
        "embedding": (captioner.decoder.wte, plain.gpt2.transformer.wte),
    }
    for name, (one, other) in pairs.items():
        gradients = [
            (p.grad, q.grad)
            for p, q in zip(one.parameters(), other.parameters(), strict=True)
            if p.grad is not None
        ]
        largest = max(float(q.abs().max()) for _, q in gradients if q is not None)
        found[name] = max(float((p - q).abs().max()) for p, q in gradients if q is not None) / largest
    return found


def parts(ours: Ours) -> dict[str, float]:
    """Seconds of each part of a step, forward and backward, one by one."""
    captioner, batch = ours.captioner, ours.batch
    tokens, head = batch.tokens[..., :-1], captioner.decoder.wte.weight
    with autocast(ours.precision):
        features = captioner.encoder(batch.images).detach()
        memory = captioner.bridge(features).detach()
        hidden = captioner.hidden_states(memory, tokens, batch.places).detach().requires_grad_()

    def backward(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def both() -> None:
            with autocast(ours.precision):
                result = forward()
            result.sum().backward()  # type: ignore[no-untyped-call]

        return both

    runs = {
        "encoder": backward(lambda: captioner.encoder(batch.images)),
        "bridge": backward(lambda: captioner.bridge(features)),
        "decoder": backward(lambda: captioner.hidden_states(memory, tokens, batch.places)),
        "loss": backward(lambda: caption_loss(hidden, head, batch.targets, label_smoothing=0.1)),
        "optimiser": ours.optimizer.step,
    }
    return {name: min(seconds(run) for _ in range(3)) for name, run in runs.items()}


class Repeated(pl.LightningDataModule):
    """The same batch again and again."""

    def __init__(self, batch: CaptionBatch) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Iterator[CaptionBatch]:
        return iter(lambda: self.batch, None)

    def transfer_batch_to_device(self, batch: CaptionBatch, device: torch.device, _: int) -> CaptionBatch:
        return batch


class Clock(pl.Callback):
    """Runs bare steps between Lightning's own, so that both are timed in the same moments."""

    def __init__(self, bare: Callable[[], None]) -> None:
        self.bare = bare
        self.ratios: list[float] = []
        self._last: float | None = None

    def on_train_batch_end(self, *_: Any) -> None:
        wait()
        if self._last is not None:
            lightnings = time.perf_counter() - self._last
            self.ratios.append(lightnings / seconds(self.bare))
        self._last = time.perf_counter()


def lightning_overhead(case: Case, steps: int) -> float:
    """Seconds of a step in Lightning's loop as a share of those of the bare loop, the median."""
    bare, inside = Ours(case), Ours(case)
    limits = {"max_tokens": 8, "min_tokens": 0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    decoding = Greedy(**limits, banned=[], prefix="", batch_size=None)
    lr = dict.fromkeys(("encoder", "bridge", "decoder"), 1e-4)
    module = CaptionModule(
        inside.captioner,
        None,
        decoding,
        optimizer={"lr": lr, **OPTIMIZER},
        label_smoothing=0.1,  # type: ignore[arg-type]
    )
    clock = Clock(bare)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = pl.Trainer(
        max_steps=steps + 2,
        accelerator="auto",
        devices=1,
        precision=inside.precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        callbacks=[clock],
    )
    trainer.fit(module, datamodule=Repeated(bare.batch))
    return statistics.median(clock.ratios[1:])


def utilisation(ours: Ours, step_seconds: float) -> float | None:
    """Model FLOPs a second as a share of what the GPU's data sheet promises in bfloat16; None where it is unknown."""
    peak = next(
        (peak for name, peak in PEAK.items() if DEVICE == "cuda" and name in torch.cuda.get_device_name()),
        None,
    )
    if peak is None:
        return None
    counted = Ours(replace(ours.case, compile=False))  # what is compiled is not counted
    with FlopCounterMode(display=False) as counter:
        counted()
    return counter.get_total_flops() / step_seconds / peak


def measure(case: Case, rounds: int) -> dict[str, float]:
    """Medians over rounds in which ours with K captions and the plain way with one take turns."""
    plain, ours = Apart(plain_step, case), Ours(case)  # the other process starts meanwhile
    for step in (ours, plain) * WARM:
        step()
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(seconds(ours))
        theirs.append(seconds(plain))
    plain.close()
    ratios = [case.captions * other / own for own, other in zip(mine, theirs, strict=True)]
    found = {
        "ours": case.captions * case.pictures / statistics.median(mine),
        "plain": case.pictures / statistics.median(theirs),
        "ratio": statistics.median(ratios),
    }
    where = ", ".join(f"{name} {1000 * s:.0f}" for name, s in parts(ours).items())
    share = utilisation(ours, statistics.median(mine))
    print(
        f"{case.model:<7}{case.dtype:<5}K={case.captions}  ours {found['ours']:7.1f} pairs/s  "
        f"plain {found['plain']:7.1f}  ratio {found['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})  ms: {where}"
        + (f"  model FLOP utilisation {share:.1%}" if share else ""),
        flush=True,
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="small,b0", help="of small, medium, b0 (default: small,b0)")
    parser.add_argument("--rounds", type=int, default=5, help="of each case (default: 5)")
    has_bf16 = DEVICE == "cuda" or not bfloat16_is_slow()
    dtypes = "bf16,fp32" if has_bf16 else "fp32"
    parser.add_argument(
        "--dtypes", default=dtypes, help="bf16,fp32, or fp32 where bfloat16 would be emulated"
    )
    parser.add_argument("--captions", default="5,1", help="of each picture (default: 5,1)")
    parser.add_argument("--pictures", type=int, help="of a step (default: small and medium 8, b0 32)")
    parser.add_argument("--compile", action="store_true", help="ours with compile=true")
    parser.add_argument("--short", action="store_true", help="two rounds of b0 alone")
    options = parser.parse_args()
    tune_process()
    models, rounds = (["b0"], 2) if options.short else (options.models.split(","), options.rounds)
    if not has_bf16:
        print(
            "this CPU has no bfloat16 arithmetic: in bf16 efficap computes in float32, and the plain way emulates"
        )
    line: dict[str, Any] = {}
    for model in models:
        apart = differences(model)
        print(
            f"{model:<7}float32, K=1, apart: "
            + ", ".join(f"{name} {value:.1e}" for name, value in apart.items())
        )
        for dtype in options.dtypes.split(","):
            for captions in map(int, options.captions.split(",")):
                pictures = options.pictures or PICTURES[model]
                found = measure(Case(model, captions, dtype, pictures, options.compile), rounds)
                key = f"k{captions}_vs_plain_{dtype}"
                line[key if model == "small" else f"{key}_{model}"] = round(found["ratio"], 3)
    dtype, pictures = options.dtypes.split(",")[-1], options.pictures or PICTURES[models[0]]
    overhead = lightning_overhead(Case(models[0], 5, dtype, pictures, options.compile), 2 * rounds)
    print(f"{models[0]}: a step in Lightning's loop takes {overhead:.3f} of the bare loop's")
    print(json.dumps({**line, "vs_bare_loop": round(overhead, 3)}))


if __name__ == "__main__":
    main()
