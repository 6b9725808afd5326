"""A run for other programs: ONNX graphs that onnxruntime computes, or its decoder for transformers.

What is written is first tried on pictures, and appears under its name only when it has passed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from efficap.commands.export_check import check_captions, check_pictures
from efficap.commands.run_dir import CONFIG_FILE, TOKENIZER_DIR, RunDirectory
from efficap.errors import InputError
from efficap.models.captioner import CaptionModel
from efficap.models.pretrained.export_transformers import check_transformers, export_transformers
from efficap.models.pretrained.onnx_runtime import OnnxCaptioner, require_package
from efficap.tokenizer import CaptionTokenizer


def export(run: str | Path, out: Path, *, format: str, int8: bool = False, images: str | None = None) -> None:
    """Write the weights of a run for other programs, and print what was checked.

    Args:
        run: a run directory.
        out: a directory that does not exist yet, or is empty.
        format: ``onnx``: the directory is one that caption.py and eval.py take as a run; ``transformers``: a
            directory that ``GPT2LMHeadModel.from_pretrained`` loads.
        int8: of ONNX: matrix products in 8-bit integers.
        images: pictures to check it on, as for caption.py; None: 16 that are drawn from a seed.

    Raises:
        InputError: there is nothing to export, the format cannot express it, or what was written gives something else.
    """
    source = RunDirectory(run, "--run")
    if source.export:
        raise InputError(f"--run={run} is an ONNX export already; give the run that it was made from")
    if int8 and format != "onnx":
        raise InputError(f"--int8 belongs to --format onnx, not {format}; leave it out")
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require_package(package)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out={out} exists and is no empty directory; name a new or an empty one")
    pictures = check_pictures(source, images)
    tokenizer = source.tokenizer()
    captioner = source.captioner(tokenizer, torch.device("cpu"))
    assert isinstance(captioner, CaptionModel)
    with _published(out) as directory:
        if format == "onnx":
            report = _export_onnx(source, tokenizer, captioner, directory, pictures, int8)
        else:
            report = _export_transformers(source, tokenizer, captioner, directory, pictures)
    for line in report:
        print(line)
    print(f"written: {out}")


def _export_onnx(
    source: RunDirectory,
    tokenizer: CaptionTokenizer,
    captioner: CaptionModel,
    directory: Path,
    pictures: torch.Tensor,
    int8: bool,
) -> list[str]:
    from efficap.models.pretrained.onnx_graphs import export_graphs, quantize_graphs

    export_graphs(captioner, source.config["model"]["image_size"], directory)
    before = _sizes(directory)
    if int8:
        quantize_graphs(directory)
    config = {**source.config, "export": {"format": "onnx", "int8": int8}}
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    tokenizer.save(directory / TOKENIZER_DIR)
    exported = RunDirectory(directory, "--out").captioner(tokenizer, torch.device("cpu"))
    assert isinstance(exported, OnnxCaptioner)
    max_tokens = source.config["decoding"]["max_tokens"]
    report = check_captions(captioner, exported, tokenizer, max_tokens, pictures, demand=not int8)
    after = _sizes(directory)
    if int8:
        return [*report, *(f"{name}: {before[name]} in float32, {after[name]} in int8" for name in after)]
    return [*report, *(f"{name}: {size}" for name, size in after.items())]


def _sizes(directory: Path) -> dict[str, str]:
    """Of each graph, with the weights that lie beside it."""
    return {
        graph.name: f"{sum(f.stat().st_size for f in directory.glob(f'{graph.name}*')) / 1e6:.1f} MB"
        for graph in sorted(directory.glob("*.onnx"))
    }


@torch.no_grad()
def _export_transformers(
    source: RunDirectory,
    tokenizer: CaptionTokenizer,
    captioner: CaptionModel,
    directory: Path,
    pictures: torch.Tensor,
) -> list[str]:
    max_tokens = source.config["decoding"]["max_tokens"]
    export_transformers(captioner.decoder, tokenizer, directory, max_tokens=max_tokens)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(tokenizer.vocab_size, (len(pictures), max_tokens), generator=random)
    difference = check_transformers(captioner.decoder, directory, captioner.encode(pictures), tokens)
    return [f"logits over {len(pictures)} pictures: transformers' differ by {difference:.1g} at most"]


@contextlib.contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A directory to write to whose contents are `out`'s at the end; it is removed if there is an error."""
    own = f".{out.name}.{os.getpid()}"
    # What is there, and empty, may be where another disk begins.
    temporary = (out if out.is_dir() else out.parent) / own
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.is_dir():
            for part in list(temporary.iterdir()):
                os.replace(part, out / part.name)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
