"""Beam search: efficap against transformers' `generate` with the same weights, in one run, in pairs.

    python bench/decode.py [--rounds 5] [--grow] [--short] [--compile]

`small`'s sizes at 224 pixels with random weights: 8 pictures, 5 beams, 20 tokens; and once more with captions that
end after 8 to 16 tokens. `--grow` shows how both grow with beams, pictures, length and model size. `generate` has a
process of its own in which nothing is set, as its user would have it; efficap sets what its commands do. The floor is
the encoder, the bridge and the bare matrix products of the same decoding, measured in the same run. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # and not in `generate`'s process
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as efficap sets it, before torch is loaded

import torch
from apart import Apart
from decoders import DEVICE, Case, Floor, build_random, generate_for, ours, random_images
from transformers.utils import logging

from efficap.commands.entry import tune_process
from efficap.models.fold import fold_norms


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, rounds: int, *, compile: bool = False) -> dict[str, float | bool]:
    """Medians over rounds in which the three take turns: seconds, ratios, and whether the tokens agree."""
    generate = Apart(generate_for, case)
    captioner, floor = build_random(case), Floor(build_random(case), case)
    for decoder in (captioner, floor.captioner):  # as caption.py and eval.py do
        fold_norms(decoder.encoder.backbone)
    if compile:
        captioner.compile_decoding()
    else:
        captioner.pack_weights()
    images = random_images(case)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(captioner, images, case),
        "generate": generate,
        "floor": lambda: floor(images),
    }
    with torch.inference_mode():
        found, expected = runs["ours"]().cpu(), torch.tensor(generate())  # and everything is warm
        length = min(found.shape[1], expected.shape[1])
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(seconds(run))
    generate.close()
    ratios = [other / mine for mine, other in zip(times["ours"], times["generate"], strict=True)]
    floors = [mine / bare for mine, bare in zip(times["ours"], times["floor"], strict=True)]
    return {
        **{f"{name}_per_second": case.pictures / statistics.median(t) for name, t in times.items()},
        "vs_generate": statistics.median(ratios),
        "vs_floor": statistics.median(floors),
        "tokens_equal": bool((found[:, :length] == expected[:, :length]).all()),
    }


def memory_of(way: str, case: Case) -> float:
    """What bench/decode_memory.py finds, in a process whose allocator gives back each tensor as it is freed."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("decode_memory.py")),
        way,
        json.dumps(asdict(case)),
    ]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(result.stdout.splitlines()[-1])


GROW = [
    *(Case(dtype="bfloat16", beams=beams) for beams in (1, 2, 5, 10)),
    *(Case(dtype="bfloat16", pictures=pictures) for pictures in (1, 8, 32, 64)),
    *(Case(dtype="bfloat16", tokens=tokens) for tokens in (10, 20, 40)),
    Case(dtype="bfloat16", model="medium"),
]


def show(case: Case, figures: dict[str, float | bool]) -> None:
    print(
        f"{case.model:<7}{case.dtype:<9}{case.pictures:>4} pictures{case.beams:>3} beams{case.tokens:>3} tokens"
        f"{' ending' if case.ends else '':<7}  ours {figures['ours_per_second']:6.2f}/s  "
        f"generate {figures['generate_per_second']:6.2f}/s  floor {figures['floor_per_second']:6.2f}/s  "
        f"ratio {figures['vs_generate']:.2f}  floor x {figures['vs_floor']:.2f}  "
        f"tokens {'equal' if figures['tokens_equal'] else 'differ'}",
        flush=True,
    )


def show_memory(case: Case) -> tuple[float, float]:
    """MiB that decoding adds, by ours and by `generate`."""
    mine, other = memory_of("ours", case), memory_of("generate", case)
    print(
        f"{case.model:<7}{case.dtype:<9}memory added: ours {mine:.0f} MiB, generate {other:.0f} MiB",
        flush=True,
    )
    return mine, other


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each case (default: 5)")
    parser.add_argument("--grow", action="store_true", help="also other sizes")
    parser.add_argument("--short", action="store_true", help="two rounds, no memory")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    options = parser.parse_args()
    logging.set_verbosity_error()
    tune_process()
    rounds = 2 if options.short else options.rounds
    cases = {
        "fp32": Case(),
        "bf16": Case(dtype="bfloat16"),
        "fp32_ending": Case(ends=True),
        "bf16_ending": Case(dtype="bfloat16", ends=True),
    }
    results: dict[str, dict[str, float | bool]] = {}
    for name, case in cases.items():
        results[name] = measure(case, rounds, compile=options.compile)
        show(case, results[name])
    line: dict[str, Any] = {
        "vs_generate_fp32": results["fp32"]["vs_generate"],
        "vs_generate_bf16": results["bf16"]["vs_generate"],
        "vs_floor_bf16": results["bf16"]["vs_floor"],
        "vs_generate_bf16_ending": results["bf16_ending"]["vs_generate"],
        "tokens_equal": results["fp32"]["tokens_equal"] and results["fp32_ending"]["tokens_equal"],
    }
    if not options.short:
        for dtype in ("float32", "bfloat16"):
            mine, other = show_memory(Case(dtype=dtype))
            line |= {f"peak_mib_{dtype}": mine, f"generate_peak_mib_{dtype}": other}
    if options.grow:
        for case in GROW:
            show(case, measure(case, rounds, compile=options.compile))
            show_memory(case)
    print(
        json.dumps(
            {key: round(value, 3) if isinstance(value, float) else value for key, value in line.items()}
        )
    )


if __name__ == "__main__":
    main()
