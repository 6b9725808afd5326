"""An epoch of training with a frozen encoder, its features cached and not.

    python bench/feature_cache.py [--model tiny] [--image-size 224] [--captions 1,5] [--pictures 512] [--rounds 5]
        [--short] [--table FILE --image-dir DIR]

efficientnet_b0 before tiny's or mini's bridge and decoder, 4,096 words, batches of 32 pictures; pictures of 640 x 480
written by itself unless a table is given. Random weights: they take the same time. Both take an epoch in turn; the
ratio is the median over rounds of two times within one round. Encoding the pictures for the cache, which happens once,
is timed apart. What is saved grows with the pictures' size, what remains with the captions and the decoder. The last
line is one JSON object, with `k1_epoch_ratio` for one caption of a picture, and so on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficap.commands.entry import CONF, plain, tune_process

BATCH, WORDS = 32, 4096
ENCODER = "efficientnet_b0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.short:
        options.pictures, options.rounds = 128, 2
    tune_process()  # before torch is loaded, as train.py does
    with tempfile.TemporaryDirectory(prefix="efficap-bench-") as name:
        table, image_dir = options.table, options.image_dir
        if table is None:
            table, image_dir = _write(Path(name), options)
        result = {"model": options.model, "image_size": options.image_size}
        for captions in map(int, options.captions.split(",")):
            features = Path(name) / f"features-{captions}"
            result |= _race(options, captions, table, image_dir, features)
    print(json.dumps(result))
    return 0


def _race(
    options: argparse.Namespace, captions: int, table: str, image_dir: str, features: Path
) -> dict[str, float]:
    """Both in turn, with so many captions of a picture: times are printed, and returned by name."""
    whole = _Training(options, captions, table, image_dir, None)
    cached = _Training(options, captions, table, image_dir, features)
    rounds = []
    for training in (whole, cached):
        training.epoch(0)  # warm-up: page cache, allocator
    for number in range(options.rounds):
        pair = [whole, cached] if number % 2 == 0 else [cached, whole]
        seconds = {training: training.epoch(number + 1) for training in pair}
        rounds.append((seconds[whole], seconds[cached]))
        _say(f"round {number + 1}: {seconds[whole]:.2f} s without, {seconds[cached]:.2f} s with the cache")
    for training in (whole, cached):
        training.data.end()
    ratios = [without / with_cache for without, with_cache in rounds]
    without, with_cache = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(ratios)
    print(
        f"{whole.pictures:,} pictures of {options.image_size} pixels, {captions} captions each; {ENCODER}, frozen, "
        f"in model={options.model}"
    )
    print(f"epoch without the cache  {without:8.2f} s")
    print(f"epoch with the cache     {with_cache:8.2f} s")
    print(f"ratio                    {ratio:8.2f}    least {min(ratios):.2f}, most {max(ratios):.2f}")
    print(f"filling it, once         {cached.filling:8.2f} s")
    seen = {
        "epoch_s": without,
        "epoch_cached_s": with_cache,
        "epoch_ratio": ratio,
        "filling_s": cached.filling,
    }
    return {f"k{captions}_{name}": round(value, 3) for name, value in seen.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", default="tiny", choices=["tiny", "mini"], help="whose bridge and decoder (default: tiny)"
    )
    parser.add_argument("--image-size", type=int, default=224, metavar="S", help="pixels (default: 224)")
    parser.add_argument(
        "--captions", default="1,5", metavar="K", help="of a picture (default: 1,5, one after the other)"
    )
    parser.add_argument("--pictures", type=int, default=512, metavar="N", help="to write (default: 512)")
    parser.add_argument("--rounds", type=int, default=5, metavar="R", help="(default: 5)")
    parser.add_argument("--table", metavar="FILE", help="a table, in place of pictures written here")
    parser.add_argument("--image-dir", metavar="DIR", help="its pictures")
    parser.add_argument("--short", action="store_true", help="a quick look: 128 pictures, 2 rounds")
    return parser


def _write(folder: Path, options: argparse.Namespace) -> tuple[str, str]:
    from data_files import write_captions, write_photograph

    _say(f"writing {options.pictures:,} pictures of 640 x 480")
    (folder / "images").mkdir()
    names = [f"{number:06d}.jpg" for number in range(options.pictures)]
    for number, name in enumerate(names):
        write_photograph(folder / "images" / name, number)
    write_captions(folder / "captions.csv", names)
    text = (folder / "captions.csv").read_text()
    (folder / "captions.csv").write_text(
        text.replace(",train\n", ",val\n", 5)
    )  # one picture, as one is asked for
    return str(folder / "captions.csv"), str(folder / "images")


class _Training:
    """A captioner and its data; with a folder for features, these are cached in it.

    Attributes:
        pictures: to train on.
        filling: seconds that encoding all of them took; 0 without a folder.
    """

    def __init__(
        self, options: argparse.Namespace, captions: int, table: str, image_dir: str, features: Path | None
    ) -> None:
        import torch
        from hydra.utils import instantiate

        from efficap.models.build import build_model, preprocessing, resolve_model
        from efficap.tokenizer import CaptionTokenizer
        from efficap.training.feature_cache import cache_features

        cfg = _compose(options, captions, table, image_dir, features)
        model = resolve_model(cfg["model"])
        self.data = instantiate(cfg["data"])
        tokenizer = CaptionTokenizer.learn(self.data.training_captions(), WORDS)
        self.data.prepare(tokenizer, **preprocessing(model), splits=["train", "val"])
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.captioner = build_model(model, WORDS).to(self.device)
        begin = time.perf_counter()
        cache_features(
            self.captioner.encoder,
            self.data,
            name=ENCODER,
            preprocessing=preprocessing(model),
            device=self.device,
        )
        self.filling = time.perf_counter() - begin if features is not None else 0.0
        self.captioner.train()
        self.pictures = self.data.training_size
        learning = (parameter for parameter in self.captioner.parameters() if parameter.requires_grad)
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
        self.loader = self.data.train_dataloader()

    def epoch(self, number: int) -> float:
        """Seconds of one epoch, from the first picture to the last step."""
        import torch

        from efficap.training.losses import batch_loss

        begin = time.perf_counter()
        for batch in self.loader.of_epoch(number):
            batch = batch.to(self.device, non_blocking=True)
            self.optimizer.zero_grad()
            batch_loss(self.captioner, batch, label_smoothing=0.1).backward()
            self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def _compose(
    options: argparse.Namespace, captions: int, table: str, image_dir: str, features: Path | None
) -> dict[str, Any]:
    import hydra

    overrides = [
        f"model={options.model}",
        f"model.encoder.name={ENCODER}",
        "model.encoder.frozen=true",
        "name=bench",
        "output_dir=unused",
        "data=csv",
        f"data.table={table}",
        f"data.image_dir={image_dir}",
        f"data.batch_size={BATCH}",
        f"model.image_size={options.image_size}",
        f"data.captions_per_image={captions}",
        "data.check_images=false",
        f"data.feature_cache={'false' if features is None else 'true'}",
        f"data.feature_cache_dir={features or 'null'}",
    ]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(hydra.compose("train", overrides=overrides))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
