"""Captioning by PyTorch, in float32 and bfloat16, and by onnxruntime, in float32 and int8, with the same weights.

    python bench/export.py [--run RUN --images DIR] [--rounds 3] [--pictures 16] [--short]

Without a run: `small`'s sizes at 224 pixels with random weights and pictures; captions are 20 tokens long. Contenders
take turns. How many captions are the same as PyTorch's means something with a trained run only. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as efficap sets it, before torch is loaded

import torch
from decode import Case, build_random
from torch import Tensor

from efficap.commands.export_check import check_pictures
from efficap.commands.run_dir import RunDirectory
from efficap.decoding import Beam, Decoding, Greedy
from efficap.models.pretrained.onnx_graphs import export_graphs, quantize_graphs
from efficap.models.pretrained.onnx_runtime import OnnxCaptioner

TOKENS = 20
RULES: dict[str, Any] = {
    "min_tokens": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "banned": [],
    "prefix": "",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", help="a trained run, instead of random weights")
    parser.add_argument("--images", help="its pictures, at most 16 of them (default: blots of colour)")
    parser.add_argument("--rounds", type=int, default=3, help="of each contender (default: 3)")
    parser.add_argument("--pictures", type=int, default=16, help="at a time (default and limit: 16)")
    parser.add_argument("--short", action="store_true", help="one round of four pictures")
    options = parser.parse_args()
    if options.short:
        options.rounds, options.pictures = 1, 4
    model, pictures, end = _subject(options)
    pictures = pictures[: options.pictures]
    with tempfile.TemporaryDirectory() as place:
        contenders, sizes = _contenders(model, Path(place), pictures.shape[-1])
        result: dict[str, Any] = {"pictures": len(pictures), "rounds": options.rounds, "megabytes": sizes}
        for name, decoding in _decodings().items():
            result[name] = _measured(contenders, decoding, pictures, end, options.rounds)
    _print(result)
    print(json.dumps(result))
    return 0


def _subject(options: argparse.Namespace) -> tuple[Any, Tensor, int]:
    """The model, pictures for it, and its EOS."""
    if options.run is None:
        case = Case()
        images = torch.randint(0, 256, (16, 3, 224, 224), dtype=torch.uint8)
        model = build_random(case)
        return model, images, model.decoder.wte.num_embeddings - 1
    run = RunDirectory(options.run)
    tokenizer = run.tokenizer()
    model = run.captioner(tokenizer, torch.device("cpu"))
    return model, check_pictures(run, options.images), tokenizer.eos_id


def _contenders(model: Any, place: Path, image_size: int) -> tuple[dict[str, Any], dict[str, float]]:
    """PyTorch's with float32 and bfloat16 weights, both exports, and the size of each export's graphs in megabytes."""
    contenders, sizes = {"pytorch": model, "pytorch_bf16": copy.deepcopy(model).to(torch.bfloat16)}, {}
    for name in ("onnx", "onnx_int8"):
        directory = place / name
        directory.mkdir()
        export_graphs(model, image_size, directory)
        if name == "onnx_int8":
            quantize_graphs(directory)
        sizes[name] = round(sum(file.stat().st_size for file in directory.iterdir()) / 1e6, 1)
        words, positions = model.decoder.wte.num_embeddings, model.decoder.wpe.num_embeddings
        contenders[name] = OnnxCaptioner(directory, n_positions=positions, vocab_size=words)
    return contenders, sizes


def _decodings() -> dict[str, Decoding]:
    beams: dict[str, Any] = {"num_beams": 5, "num_return_sequences": 1, "num_beam_groups": 1}
    beams |= {"length_penalty": 1.0, "early_stopping": False, "diversity_penalty": 0.0}
    return {
        "greedy": Greedy(max_tokens=TOKENS, **RULES),
        "5 beams": Beam(max_tokens=TOKENS, **RULES, **beams),
    }


def _measured(
    contenders: dict[str, Any], decoding: Decoding, pictures: Tensor, end: int, rounds: int
) -> dict[str, Any]:
    """Pictures a second of each contender, the median of all rounds, and the share of PyTorch's captions."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    said: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for name, model in contenders.items():
            begin = time.perf_counter()
            said[name] = _captions(model, decoding, pictures, end)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    rates = {name: len(pictures) / statistics.median(times) for name, times in seconds.items()}
    same = {
        name: sum(a == b for a, b in zip(rows, said["pytorch"], strict=True)) / len(pictures)
        for name, rows in said.items()
    }
    return {
        name: {"pictures_per_s": round(rates[name], 3), "same_captions": round(same[name], 3)}
        for name in contenders
    }


@torch.inference_mode()
def _captions(model: Any, decoding: Decoding, pictures: Tensor, end: int) -> list[list[int]]:
    names = [str(place) for place in range(len(pictures))]
    step = model.start(pictures, TOKENS)
    decoded = decoding.decode(step, names, bos_id=end, eos_id=end, device=torch.device("cpu"))
    best = zip(decoded.tokens[:, 0].tolist(), decoded.lengths[:, 0].tolist(), strict=True)
    return [tokens[:length] for tokens, length in best]


def _print(result: dict[str, Any]) -> None:
    print(f"{result['pictures']} pictures at a time, {torch.get_num_threads()} threads")
    for decoding in _decodings():
        for name, figures in result[decoding].items():
            size = f"{result['megabytes'][name]:8.1f} MB" if name in result["megabytes"] else ""
            print(
                f"{decoding:8} {name:12} {figures['pictures_per_s']:8.2f} pictures/s, "
                f"{figures['same_captions']:4.0%} of the captions the same {size}"
            )


if __name__ == "__main__":
    sys.exit(main())
