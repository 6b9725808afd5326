"""Captions learned in a few minutes: efficap against what a user would write with timm and transformers.

    python bench/budget.py --table FILE --image-dir FOLDER [--minutes 10] [--seeds 0,1] [--together] [--keep RUNS]

Both train the same sizes from nothing on the training split: EfficientNet-B0 at 128 pixels, 2 blocks, a decoder of 4
layers and width 256, a vocabulary of 4,096. Then both caption the validation split by beam search with 3 beams, and
CIDEr, BLEU-4 and the share of distinct captions are taken; efficap's beams count the picture's evidence for a word,
and no caption says two words in a row twice (the plain way's CIDEr is told with that rule, too). The clock counts
training alone: tokenizers are learned before, and the vectors that efficap's words begin with, in seconds. The plain
way is a loader of picture-caption pairs with Pillow and torchvision, transformers' GPT-2 with its own dropout, Adam.
`--best` trains experiment=flickr8k in place of these sizes. efficap trains in bfloat16 where the CPU has its products.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as efficap sets it, before torch is loaded
os.environ.setdefault("WANDB_MODE", "disabled")

ROOT = Path(__file__).parents[1]
PLAIN_LR = 5e-4
SIZES = [
    "model=tiny",
    "model.encoder.name=efficientnet_b0",
    "model.encoder.output_stride=32",  # 4 x 4 latent positions, EfficientNet-B0's own, as the plain way has
    "model.bridge.n_blocks=2",
    "model.decoder.n_layer=4",
    "model.decoder.n_embd=256",
    "data.batch_size=32",  # pictures, likewise
    "data.crop_scale=[0.9,1.0]",  # it sees its pictures two to ten times: too few to learn them by heart
    *(f"model.lr.{part}=3e-3" for part in ("encoder", "bridge", "decoder")),
    "training.hidden_captions=[1.0,0.4]",  # all has to come from the picture at first
]
DECODING = [
    "decoding=beam",
    "decoding.num_beams=3",
    "decoding.evidence=0.5",
    "decoding.no_repeat_ngram_size=2",
]


def ours(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """Train by experiment=flickr8k, at the plain way's sizes unless `--best`; 3 beams caption."""
    from hydra import compose, initialize_config_dir

    from efficap.commands.entry import plain, tune_process
    from efficap.commands.evaluate import evaluate
    from efficap.commands.train import train

    changes = [
        "experiment=flickr8k",
        *([] if options.best else SIZES),
        f"data.table={options.table}",
        f"data.image_dir={options.image_dir}",
        f"data.num_workers={options.workers}",
        "data.flip=true",
        f"trainer.max_time=00:00:{options.minutes:02d}:00",
        "trainer.accelerator=cpu",  # as the plain way
        "trainer.precision=bf16-mixed",  # where the CPU computes in it
        "trainer.val_check_interval=00:01:00:00",  # at the end
        "trainer.enable_progress_bar=false",
        "logger=csv",
        f"seed={seed}",
        f"output_dir={folder}",
        "name=budget",
    ]
    tune_process()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = train(plain(compose("train", changes)))
        trained = json.loads((run / "metrics.json").read_text())
        evaluation = plain(compose("eval", [f"run={run}", "split=val", "accelerator=cpu", *DECODING]))
    scores = evaluate({**evaluation, "metrics": ["BLEU", "CIDEr"], "gallery": 0})
    return {
        "pairs_per_second": trained["pairs"] / trained["training_seconds"],
        "steps": trained["steps"],
        **{name: float(scores[name] or 0) for name in ("CIDEr", "BLEU-4", "distinct")},
    }


def theirs(options: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """Train on pairs and caption with `generate`."""
    import pandas as pd
    import torch
    from PIL import Image
    from plain import Plain, build
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from efficap.evaluation.scores import distinct_share, score_captions
    from efficap.tokenizer import CaptionTokenizer

    table = pd.read_csv(options.table)
    splits = {name: table[table["split"] == name] for name in ("train", "val")}
    tokenizer = CaptionTokenizer.learn(splits["train"]["caption"], 4096)
    crop = v2.Compose([v2.RandomResizedCrop(128, (0.6, 1.0), (0.8, 1.25)), v2.PILToTensor()])
    whole = v2.Compose([v2.Resize(128), v2.CenterCrop(128), v2.PILToTensor()])

    class Pairs(Dataset[Any]):
        def __init__(self, rows: pd.DataFrame, transform: v2.Compose) -> None:
            self.files, self.captions, self.transform = (
                rows["file_name"].tolist(),
                rows["caption"].tolist(),
                transform,
            )

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
            with Image.open(Path(options.image_dir) / self.files[index]) as image:
                return self.transform(image.convert("RGB")), self.captions[index]

    def collate(items: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        encoded = [torch.tensor(ids) for ids in tokenizer.encode([caption for _, caption in items], 40)[0]]
        tokens = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=tokenizer.pad_id)
        return torch.stack([image for image, _ in items]), tokens, torch.tensor([len(ids) for ids in encoded])

    torch.manual_seed(seed)
    captioner = build("b0", vocab_size=tokenizer.vocab_size)
    model = Plain(captioner, "efficientnet_b0", dropout=0.1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=PLAIN_LR)
    loader = DataLoader(
        Pairs(splits["train"], crop),
        32,
        shuffle=True,
        num_workers=options.workers,
        collate_fn=collate,
        drop_last=True,
    )
    start, pairs, steps = time.monotonic(), 0, 0
    while time.monotonic() - start < 60 * options.minutes:
        for images, tokens, lengths in loader:
            optimizer.zero_grad()
            loss = model.loss(images, tokens, lengths)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            pairs, steps = pairs + len(images), steps + 1
            if time.monotonic() - start >= 60 * options.minutes:
                break
    seconds = time.monotonic() - start
    model.eval()
    pictures = splits["val"].drop_duplicates("file_name")
    names = pictures["file_name"].tolist()

    def captions(**rules: int) -> dict[str, str]:
        ends = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
        texts: list[str] = []
        with torch.inference_mode():
            for images, *_ in DataLoader(Pairs(pictures, whole), 32, collate_fn=collate):
                ids = model.generate(images, **ends, num_beams=3, max_length=32, **rules)
                texts += [tokenizer.decode(row) for row in ids.tolist()]
        return dict(zip(names, texts, strict=True))

    references = splits["val"].groupby("file_name")["caption"].apply(list).to_dict()
    predictions = captions()
    scores = score_captions(predictions, references, metrics=["BLEU", "CIDEr"])
    without_repeats = score_captions(captions(no_repeat_ngram_size=2), references, metrics=["CIDEr"])
    return {
        "pairs_per_second": pairs / seconds,
        "steps": steps,
        "CIDEr": float(scores["CIDEr"] or 0),
        "BLEU-4": float(scores["BLEU-4"] or 0),
        "distinct": distinct_share(list(predictions.values())),
        "CIDEr, nothing twice": float(without_repeats["CIDEr"] or 0),
    }


def start(side: str, seed: int, folder: Path, arguments: list[str], cores: set[int]) -> subprocess.Popen[str]:
    """One side in a process of its own, on some of the cores."""
    command = [
        sys.executable,
        __file__,
        *arguments,
        "--side",
        side,
        "--seed",
        str(seed),
        "--folder",
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    os.sched_setaffinity(process.pid, cores)
    return process


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", required=True, help="CSV with file_name, caption, split (train, val)")
    parser.add_argument("--image-dir", required=True)
    parser.add_argument("--minutes", type=int, default=10, help="of training (default: 10)")
    parser.add_argument("--seeds", default="0,1", help="(default: 0,1)")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each side (default: 1)")
    parser.add_argument("--together", action="store_true", help="both at a time, each on half of the cores")
    parser.add_argument("--best", action="store_true", help="the best recipe found, ours alone")
    parser.add_argument("--keep", metavar="FOLDER", help="where efficap's runs stay")
    for name, kind in (("side", str), ("seed", int), ("folder", Path)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps((ours if options.side == "ours" else theirs)(options, options.seed, options.folder)))
        return
    arguments = sys.argv[1:]
    sides = ["ours"] if options.best else ["ours", "plain"]
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    shares = [set(cores[:half]), set(cores[half:])] if options.together else [set(cores)] * 2
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary).absolute()
        for seed in map(int, options.seeds.split(",")):
            running = {}
            for side, share in zip(sides, shares, strict=False):
                running[side] = start(side, seed, folder / f"{side}-{seed}", arguments, share)
                if not options.together and running[side].wait():
                    sys.exit(f"{side} failed")  # and not ten minutes later
            for side, process in running.items():
                output = process.communicate()[0]
                if process.returncode:
                    for other in running.values():
                        other.terminate()  # where it still runs
                    sys.exit(f"{side} failed")
                found[side].append(json.loads(output.splitlines()[-1]))
                shown = "  ".join(f"{key} {value:.4g}" for key, value in found[side][-1].items())
                print(f"seed {seed}  {side:<6}{shown}", flush=True)
    line: dict[str, Any] = {
        side: {key: round(statistics.mean(run[key] for run in runs), 4) for key in runs[0]}
        for side, runs in found.items()
    }
    if "plain" in line:
        for name, key in (("pairs", "pairs_per_second"), ("cider", "CIDEr"), ("distinct", "distinct")):
            line[f"{name}_ratio"] = round(line["ours"][key] / max(line["plain"][key], 1e-9), 3)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
