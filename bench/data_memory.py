"""What loading costs in memory.

    python bench/data_memory.py [table] [million] [--short]

table: what a loader process takes for a table as large as COCO's, against a bare one with the same imports, and against
one with Python lists. million: the process that reads a million samples of shards. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
MB = 1e6
SIDE = 32  # pixels of the pictures, and of what is made of them
WORKERS = 2
SAMPLES = 20  # looks at the memory in an epoch of the table, 100 in the million


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.child:
        answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
        print(json.dumps(CHILDREN[options.child](options.folder)), file=answers, flush=True)
        return 0
    if options.short:
        options.pictures, options.samples, options.per_shard = 4_000, 40_000, 1_000
    result: dict[str, Any] = {}
    for part in options.parts or list(PARTS):
        with tempfile.TemporaryDirectory(prefix="efficap-bench-") as name:
            result |= PARTS[part](Path(name), options)
    print(json.dumps(result))
    return 0


def _parser() -> argparse.ArgumentParser:
    first = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument("parts", nargs="*", metavar="PART", help="table, million (default: both)")
    parser.add_argument(
        "--pictures", type=int, default=113_287, metavar="N", help="of the table (default: COCO's 113287)"
    )
    parser.add_argument(
        "--samples", type=int, default=1_000_000, metavar="N", help="read from shards (default: 1000000)"
    )
    parser.add_argument("--per-shard", type=int, default=10_000, metavar="N", help="(default: 10000)")
    parser.add_argument("--short", action="store_true", help="a quick look at small sizes")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _child(name: str, folder: Path) -> Any:
    """What one measurement answers, taken in a process of its own."""
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    if answer.returncode:
        raise SystemExit(f"{name} ended with status {answer.returncode}")
    return json.loads(answer.stdout)


# The table


def table(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What a loader process adds to a bare one, in MB, and how it grows over an epoch."""
    from data_files import write_table

    _say(f"table: {options.pictures:,} pictures of {SIDE} x {SIDE}, five captions each")
    write_table(folder, options.pictures, SIDE)
    (folder / "sizes.json").write_text(json.dumps({"pictures": options.pictures}))
    seen = {name: _child(name, folder) for name in ("bare", "csv", "lists")}
    result: dict[str, Any] = {"table_pictures": options.pictures}
    print(
        f"\nMB of a loader process{'':10}{'uss':>8}{'pss':>8}{'rss':>8}   at the end of an epoch; since a tenth of it"
    )
    for name, looks in seen.items():
        last, early = looks[-1], looks[len(looks) // 10]
        sizes = "".join(f"{last[kind]:8.1f}" for kind in KINDS)
        growth = "".join(f"{last[kind] - early[kind]:+8.1f}" for kind in KINDS)
        print(f"{name:32}{sizes}   {growth}")
        for kind in KINDS:
            if name != "bare":
                result[f"{name}_adds_{kind}_mb"] = round(last[kind] - seen["bare"][-1][kind], 1)
                result[f"{name}_grows_{kind}_mb"] = round(last[kind] - early[kind], 1)
    return result


KINDS = ("uss", "pss", "rss")


def csv_workers(folder: Path) -> list[dict[str, float]]:
    """The loader processes of data=csv over an epoch."""
    from data_contenders import data_module, table_overrides, training_loader

    loader = training_loader(data_module(WORKERS, *table_overrides(folder)), folder, SIDE)
    return _workers((len(batch.images) for batch in loader), folder)


def list_workers(folder: Path) -> list[dict[str, float]]:
    """Those of a plain DataLoader whose captions are Python lists."""
    from data_contenders import open_pil

    return _workers((len(images) for images, _ in open_pil(folder, WORKERS, SIDE)()), folder)


def bare_workers(folder: Path) -> list[dict[str, float]]:
    """Those of a DataLoader of zeros, after the imports of data=csv."""
    import pandas
    import torch
    from data_contenders import data_module, table_overrides
    from torch.utils.data import DataLoader

    data_module(WORKERS, *table_overrides(folder))  # imports all, reads nothing
    pandas.DataFrame({"file": ["a"]}).groupby("file").size()
    zeros = torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)
    count = json.loads((folder / "sizes.json").read_text())["pictures"]
    loader: DataLoader[Any] = DataLoader(
        _Same(zeros, count), batch_size=32, num_workers=WORKERS, persistent_workers=True
    )
    return _workers((len(images) for images in loader), folder)


class _Same:
    def __init__(self, item: Any, count: int) -> None:
        self.item, self.count = item, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.item


def _workers(batches: Iterator[int], folder: Path) -> list[dict[str, float]]:
    """The memory of the largest loader process, `SAMPLES` times in an epoch, which must give all pictures."""
    import psutil

    expected = json.loads((folder / "sizes.json").read_text())["pictures"]
    looks: list[dict[str, float]] = []
    seen = 0
    for size in batches:
        seen += size
        is_last = expected - 64 <= seen < expected  # the processes may end with the last batch
        if is_last or seen * SAMPLES // expected > len(looks):
            memory = [worker.memory_full_info() for worker in psutil.Process().children(recursive=True)]
            looks.append({kind: max(getattr(m, kind) for m in memory) / MB for kind in KINDS})
    assert seen == expected, (seen, expected)
    return looks


# The million


def million(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The memory of the process that reads very many samples, in MB."""
    from data_files import multiply, write_tar

    tars = -(-options.samples // options.per_shard)
    _say(f"million: {tars} tars of {options.per_shard:,} samples")
    write_tar(folder, options.per_shard, SIDE)
    multiply(folder, tars)
    looks = _child("million", folder)
    bounds = [len(looks) * n // 10 for n in range(11)]
    result: dict[str, Any] = {"million_samples": tars * options.per_shard}
    print(f"\nMB of the process that reads {tars * options.per_shard:,} samples: peaks of each tenth")
    for kind in ("rss", "own"):
        peaks = [max(look[kind] for look in looks[a:b]) for a, b in itertools.pairwise(bounds)]
        print(f"{kind:6}" + "".join(f"{peak:8.1f}" for peak in peaks))
        result |= {
            f"million_{kind}_first_tenth_mb": round(peaks[0], 1),
            f"million_{kind}_last_tenth_mb": round(peaks[-1], 1),
            f"million_{kind}_growth": round(peaks[-1] / peaks[0], 4),
        }
    result["million_samples_per_s"] = round(looks[-1]["samples"] / looks[-1]["seconds"])
    return result


def read_million(folder: Path) -> list[dict[str, float]]:
    """A hundred looks at this process: all that is resident, and without the pages of mapped files."""
    import psutil
    from data_contenders import data_module, shards_overrides, training_loader

    loader = training_loader(data_module(WORKERS, *shards_overrides(folder)), folder, SIDE)
    own, looks, samples, begin = psutil.Process(), [], 0, time.perf_counter()
    every = max(1, len(loader) // 100)
    for number, batch in enumerate(loader):
        samples += len(batch.images)
        if number % every == every - 1:
            memory, seconds = own.memory_info(), time.perf_counter() - begin
            sizes = {"rss": memory.rss / MB, "own": (memory.rss - memory.shared) / MB}
            looks.append(sizes | {"samples": samples, "seconds": seconds})
            if len(looks) % 10 == 0:
                _say(f"{samples:,} samples, {samples / seconds:,.0f}/s, {memory.rss / MB:,.0f} MB")
    expected = (
        len(list((folder / "shards").glob("*.tar")))
        * json.loads((folder / "sizes.json").read_text())["samples"]
    )
    assert samples == expected, (samples, expected)
    return looks


PARTS = {"table": table, "million": million}
CHILDREN = {
    "bare": bare_workers,
    "csv": csv_workers,
    "lists": list_workers,
    "million": read_million,
}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
