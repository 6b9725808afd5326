"""Float32 matrix products on a CPU: torch's own against those of efficap.models.linear.

    python bench/linear.py [--threads 2]

R rows with an (O, I) weight, of GPT-2 124M: 40 rows are a step of beam search for 8 pictures, 800 a training step of
40 captions; width 256 is a small model's. Each product is computed in turn by both; the least of ten times counts.
"backward" is the gradients of input and weight. The last line is one JSON object: oneDNN's speed over torch's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from efficap.models.linear import mkl_is_slow, product

Run = Callable[[], object]
SIZES = [
    (40, 768, 3072),
    (40, 768, 50257),
    (800, 768, 768),
    (800, 768, 3072),
    (800, 3072, 768),
    (2000, 256, 1024),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: torch's)")
    torch.set_num_threads(parser.parse_args().threads)
    print(f"oneDNN is {'taken' if mkl_is_slow() else 'not taken'} on this processor")
    print(f"{'R':>5}{'I':>6}{'O':>7}            torch  oneDNN  GFLOP/s")
    ratios = {}
    for rows, inputs, outputs in SIZES:
        for name, (theirs, ours) in contenders(rows, inputs, outputs).items():
            flops = 2 * rows * inputs * outputs * (2 if name == "backward" else 1)
            speeds = [flops / seconds / 1e9 for seconds in least(theirs, ours)]
            print(f"{rows:>5}{inputs:>6}{outputs:>7}  {name:<9}{speeds[0]:>6.0f}{speeds[1]:>8.0f}")
            ratios[f"{rows}x{inputs}x{outputs} {name}"] = round(speeds[1] / speeds[0], 2)
    print(json.dumps(ratios))


def contenders(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Run, Run]]:
    """torch's way and ours of each product."""
    x, weight, slope = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    return {
        "forward": (lambda: F.linear(x, weight), lambda: product(x, weight)),
        "backward": (
            lambda: (slope @ weight, slope.T @ x),
            lambda: (product(slope, weight.T), product(slope.T, x.T)),
        ),
    }


def least(*runs: Run) -> list[float]:
    """Seconds of each, the least of ten, in turn."""
    best = [float("inf")] * len(runs)
    for _ in range(10):
        for place, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[place] = min(best[place], time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
