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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # and not in `generate`'s process
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as efficap sets it, before torch is loaded

import torch
import torch.nn.functional as F
from apart import Apart
from plain import MODELS, Plain, build
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.utils import logging

from efficap.commands.entry import tune_process
from efficap.decoding import Beam
from efficap.models.captioner import CaptionModel

VOCABULARY = 50_257
END = VOCABULARY - 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """What is decoded.

    Attributes:
        tokens: of every caption, BOS counted; with random weights none ends by itself.
        ends: captions end after 8 to 16 tokens, as people's do.
    """

    model: str = "small"
    pictures: int = 8
    beams: int = 5
    tokens: int = 20
    dtype: str = "float32"
    ends: bool = False

    def end_of(self, picture: int) -> int:
        """The length at which EOS becomes certain."""
        return 8 + picture * 5 % 9 if self.ends else self.tokens + 1


def build_random(case: Case) -> CaptionModel:
    """A captioner of random weights whose cross-attention and positions matter to what it says."""
    torch.manual_seed(0)
    captioner = build(case.model)
    for block in captioner.decoder.h:
        nn.init.normal_(block.crossattention.c_proj.weight, std=0.1)  # type: ignore[union-attr]
    nn.init.normal_(captioner.decoder.wpe.weight, std=0.3)
    return captioner.eval().to(DEVICE, getattr(torch, case.dtype))


def random_images(case: Case) -> Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 256, (case.pictures, 3, 224, 224), dtype=torch.uint8, device=DEVICE)


def theirs(plain: Plain, images: Tensor, case: Case) -> Tensor:
    """The (B, T) best captions by `generate`."""

    def ends(ids: Tensor, scores: Tensor) -> Tensor:
        due = [row for row in range(len(ids)) if ids.shape[1] >= case.end_of(row // case.beams)]
        scores[due, END] = 0.0
        return scores

    return plain.generate(
        images,
        bos_id=END,
        eos_id=END,
        num_beams=case.beams,
        max_length=case.tokens,
        length_penalty=1.0,
        logits_processor=LogitsProcessorList([ends] if case.ends else []),
    )


def generate_for(case: Case) -> Callable[[], Any]:
    """`theirs`, ready to run; returns the tokens as lists."""
    logging.set_verbosity_error()
    plain, images = Plain(build_random(case), MODELS[case.model]["encoder"]), random_images(case)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            tokens: list[list[int]] = theirs(plain, images, case).tolist()
        return tokens

    return run


def ours(captioner: CaptionModel, images: Tensor, case: Case) -> Tensor:
    """The (B, T) best captions."""
    beam = Beam(
        max_tokens=case.tokens,
        min_tokens=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        banned=[],
        prefix="",
        num_beams=case.beams,
        length_penalty=1.0,
        early_stopping=False,
        num_return_sequences=1,
        num_beam_groups=1,
        diversity_penalty=0.0,
        batch_size=None,
    )
    step = captioner.start(images, case.tokens)
    places, length = list(range(len(images))), 0

    def ending(ids: Tensor, parents: Tensor | None, kept: Tensor | None) -> Tensor:
        nonlocal places, length
        places, length = places if kept is None else [places[place] for place in kept.tolist()], length + 1
        logits = step(ids, parents, kept)
        if case.ends:
            each = len(ids) // len(places)
            rows = [n for n in range(len(ids)) if length >= case.end_of(places[n // each])]
            logits[rows, END] = logits[rows].float().logsumexp(-1).to(logits.dtype) + 20
        return logits

    names = [str(picture) for picture in range(len(images))]
    return beam.decode(ending, names, bos_id=END, eos_id=END, device=DEVICE).tokens[:, 0]


class Floor:
    """The encoder, the bridge, and the matrix products that this decoding cannot do without."""

    def __init__(self, captioner: CaptionModel, case: Case) -> None:
        self.captioner = captioner
        decoder = captioner.decoder
        layers = [module for module in decoder.h.modules() if isinstance(module, nn.Linear)]
        self.memory = [block.crossattention.c_attn for block in decoder.h]  # type: ignore[union-attr]
        skipped = {id(layer) for layer in self.memory}
        self.linears = [layer for layer in layers if id(layer) not in skipped]
        dtype = decoder.wte.weight.dtype
        alive = [
            sum(case.end_of(picture) >= length for picture in range(case.pictures))
            for length in range(1, case.tokens)
        ]
        self.rows = [count * (1 if step == 0 else case.beams) for step, count in enumerate(alive) if count]
        self.inputs = {
            (rows, layer.in_features): torch.randn(rows, layer.in_features, dtype=dtype, device=DEVICE)
            for rows in set(self.rows)
            for layer in self.linears
        }

    def __call__(self, images: Tensor) -> None:
        memory = self.captioner.encode(images)
        head = self.captioner.decoder.wte.weight
        for layer in self.memory:
            layer(memory)
        for rows in self.rows:
            for layer in self.linears:
                layer(self.inputs[rows, layer.in_features])
            F.linear(self.inputs[rows, head.shape[1]], head)


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
    if compile:
        captioner.compile_decoding()
    else:
        captioner.pack_weights()  # as caption.py and eval.py do
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
