"""Matrix products on a CPU: torch's own against those of efficap.models.linear.

    python bench/linear.py [--threads 2]

R rows with an (O, I) weight, of GPT-2 124M: 8 and 40 rows are a step of greedy decoding and of beam search for 8
pictures, 800 a training step of 40 captions; width 256 is a small model's. Each product is computed in turn by all; the
least of ten times counts. "backward" is the gradients of input and weight, "packed" a weight whose order was changed
before. oneDNN is what torch's own are in bfloat16. The last line is one JSON object: the last column's speed over
torch's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from efficap.models.linear import (
    cpu_has_bfloat16,
    linear,
    mkl_is_slow,
    mkl_is_slow_in_training,
    packed,
    product,
)

Run = Callable[[], object]
SIZES = [
    (8, 768, 3072),
    (8, 768, 50257),
    (40, 768, 3072),
    (40, 768, 50257),
    (800, 768, 768),
    (800, 768, 3072),
    (800, 3072, 768),
    (2000, 256, 1024),
]
FEW = 40  # rows of a decoding's step at most; only these are packed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: torch's)")
    torch.set_num_threads(parser.parse_args().threads)
    taken = {"decoding": mkl_is_slow(), "training": mkl_is_slow_in_training()}
    print(
        f"on this processor oneDNN is taken in {' and '.join(name for name in taken if taken[name]) or 'nothing'}"
    )
    print(f"{'R':>5}{'I':>6}{'O':>7}  {'':<18}   torch  oneDNN  packed  GFLOP/s")
    ratios = {}
    for rows, inputs, outputs in SIZES:
        for name, runs in contenders(rows, inputs, outputs).items():
            flops = 2 * rows * inputs * outputs * (2 if "backward" in name else 1)
            speeds = [flops / seconds / 1e9 for seconds in least(*runs)]
            shown = "".join(f"{speed:>8.0f}" for speed in speeds)
            print(f"{rows:>5}{inputs:>6}{outputs:>7}  {name:<18}{shown}")
            ratios[f"{rows}x{inputs}x{outputs} {name}"] = round(speeds[-1] / speeds[0], 2)
    print(json.dumps(ratios))


def contenders(rows: int, inputs: int, outputs: int) -> dict[str, list[Run]]:
    """Each product by torch, by oneDNN, and, where rows are few, with a packed weight."""
    x, weight, slope = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    found: dict[str, list[Run]] = {
        "float32 forward": forward(x, weight),
        "float32 backward": [
            lambda: (slope @ weight, slope.T @ x),
            lambda: (product(slope, weight.T), product(slope.T, x.T)),
        ],
    }
    if rows <= FEW and cpu_has_bfloat16():
        found["bfloat16 forward"] = forward(x.bfloat16(), weight.bfloat16())
    return found


def forward(x: torch.Tensor, weight: torch.Tensor) -> list[Run]:
    runs: list[Run] = [lambda: F.linear(x, weight), lambda: product(x, weight)]
    if len(x) <= FEW:
        ordered = packed(weight)
        runs.append(lambda: linear(x, ordered))
    return runs


def least(*runs: Run) -> list[float]:
    """Seconds of each, the least of ten, in turn."""
    best = [float("inf")] * len(runs)
    for _ in range(10):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            with torch.inference_mode():
                run()
            best[place] = min(best[place], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
