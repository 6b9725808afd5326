"""How long loading takes to begin: from the settings to the first batch, by number and size of shards.

    python bench/data_start.py [--shards 10 100 1000] [--samples 100 10000] [--short]

Indexes are there already. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as loading has it, before torch is loaded

from data_contenders import data_module, shards_overrides, training_loader
from data_files import multiply, write_tar

SIDE = 32  # pixels of the pictures, and of what is made of them
WORKERS = 2


def seconds(folder: Path) -> tuple[float, float]:
    """From the settings to the loader, and from there to its first batch, medians of five."""
    times = []
    for _ in range(6):
        data = data_module(WORKERS, *shards_overrides(folder))
        begin = time.perf_counter()
        loader = training_loader(data, folder, SIDE)
        ready = time.perf_counter()
        batches = iter(loader)
        next(batches)
        times.append((ready - begin, time.perf_counter() - ready))
        batches.close()
    loading, first = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return loading, first  # without the first time, which imports


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 100, 1000], metavar="N")
    parser.add_argument("--samples", type=int, nargs="+", default=[100, 10_000], metavar="N", help="in each")
    parser.add_argument("--short", action="store_true", help="a quick look at small sizes")
    options = parser.parse_args()
    if options.short:
        options.shards, options.samples = [10, 40], [100, 1_000]
    result: dict[str, float] = {}
    print(f"{'shards':>8}{'samples in each':>17}{'seconds to the loader':>24}{'to the first batch':>20}")
    with tempfile.TemporaryDirectory(prefix="efficap-bench-") as name:
        for shards, samples in itertools.product(options.shards, options.samples):
            here = Path(name) / f"{shards}_{samples}"
            write_tar(here, samples, SIDE)
            multiply(here, shards)
            loading, first = seconds(here)
            print(f"{shards:8,}{samples:17,}{loading:24.3f}{first:20.3f}", flush=True)
            result[f"start_{shards}_shards_of_{samples}_s"] = round(loading, 4)
            result[f"first_batch_{shards}_shards_of_{samples}_s"] = round(first, 4)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
