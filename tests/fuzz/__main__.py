"""python -m fuzz [--minutes 10] [--seed 0]: all kinds in turn, told what was tried; status 1 where anything failed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
os.environ["HF_HOME"] = os.path.join(
    sys.prefix, "hub"
)  # where the hub's client may look for a token: in vain

import torch

from fuzz.kinds import Kind, fuzz
from fuzz.overrides import OVERRIDES
from fuzz.runs import RUNS
from fuzz.sandbox import Sandbox
from fuzz.shards import SHARDS
from fuzz.tables import TABLES

KINDS = (TABLES, SHARDS, OVERRIDES, RUNS)
AT_ONCE = 200  # examples of a seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0, help="others give other examples")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], help="one of them alone")
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.kind in (None, kind.name)]
    torch.set_num_threads(1)
    logging.getLogger("efficap").setLevel(logging.ERROR)
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        if not Sandbox(Path(folder) / "trial").tells_reads:
            print("this disk does not note when files are read: reading by other than Python is not seen")
        for kind in kinds:
            counts, failed = _fuzz(kind, Path(folder), 60 * options.minutes / len(kinds), options.seed)
            failures += failed
            said = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(counts.items()))
            print(f"{kind.name}: {counts.total():,} examples ({said}), {failed} failures", flush=True)
    return 1 if failures else 0


def _fuzz(kind: Kind, folder: Path, seconds: float, seed: int) -> tuple[Counter[str], int]:
    counts, failed, until = Counter[str](), 0, time.monotonic() + seconds
    number = 0
    while time.monotonic() < until:
        place = folder / f"{number}-{kind.name.replace(' ', '-')}"
        try:
            fuzz(kind, place, examples=AT_ONCE, seed=1000 * seed + number, until=until, counts=counts)
        except Exception:
            failed += 1
            traceback.print_exc()
        number += 1
    return counts, failed


if __name__ == "__main__":
    sys.exit(main())
