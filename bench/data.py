"""How fast pictures and captions come: this project's loaders, and what one would use in their place.

    python bench/data.py [--pictures 600] [--seconds 10] [--rounds 5] [--short]

Each contender runs in a process of its own, on the same files and the same cores, in turn with the others; ratios are
medians over rounds of two rates within one round. The last line is one JSON object.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ABOUT = {
    "csv": "data=csv",
    "pil": "a plain DataLoader with Pillow",
    "webdataset": "data=webdataset, the .txt (DALI on the CPU)",
    "dali": "DALI's own reader and decoder: no crop, no tokens",
    "dali_crop": "the same with DALI's own random crop",
    "webdataset_lib": "the webdataset library with Pillow",
    "csv_full": "data=csv data.scaled_decoding=false",
    "webdataset_json": "data=webdataset data.caption_field=captions",
}
RATIOS = {
    "csv_vs_pil": ("csv", "pil"),
    "csv_full_vs_pil": ("csv_full", "pil"),
    "dali_vs_bare": ("webdataset", "dali"),
    "dali_vs_bare_with_crop": ("webdataset", "dali_crop"),
    "dali_json_vs_bare": ("webdataset_json", "dali"),
    "webdataset_lib_vs_csv": ("webdataset_lib", "csv"),
    "webdataset_vs_lib": ("webdataset", "webdataset_lib"),
    "webdataset_vs_csv": ("webdataset", "csv"),
}
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.contender:
        return _contend(options.contender, options.folder, options.cores)
    if options.short:
        options.pictures, options.seconds, options.rounds = 128, 1.0, 2
    names = options.only or list(ABOUT)
    with tempfile.TemporaryDirectory(prefix="efficap-bench-") as name:
        mean = _write(Path(name), options)
        rounds = _race(Path(name), names, options)
    _report(rounds, {"pictures": options.pictures, "mean_bytes": round(mean), "cores": options.cores})
    return 0


def _parser() -> argparse.ArgumentParser:
    first = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=first)
    parser.add_argument(
        "--pictures", type=int, default=600, metavar="N", help="640 x 480 JPEGs (default: 600)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=10,
        metavar="S",
        help="of whole epochs in a round, at least (default: 10)",
    )
    parser.add_argument("--rounds", "--repeats", type=int, default=5, metavar="R", help="(default: 5)")
    parser.add_argument("--cores", type=int, default=2, metavar="C", help="to use (default: 2)")
    parser.add_argument(
        "--short", action="store_true", help="a quick look: 128 pictures, 2 rounds of a second"
    )
    parser.add_argument("--only", nargs="+", choices=list(ABOUT), metavar="NAME", help=", ".join(ABOUT))
    parser.add_argument("--contender", choices=list(ABOUT), help=argparse.SUPPRESS)  # one process of the race
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser


def _write(folder: Path, options: argparse.Namespace) -> float:
    _say(f"writing {options.pictures:,} pictures of 640 x 480, and the same as shards")
    from data_files import write_all

    mean = write_all(folder, options.pictures, options.cores)
    _say(f"{mean / 1000:.0f} kB each")
    return mean


def _race(folder: Path, names: list[str], options: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """What each contender did in each round."""
    runners: dict[str, subprocess.Popen[str]] = {}
    rounds = []
    try:
        for name in names:
            runners[name] = _start(name, folder, options.cores)
            _say(f"{name}: {ABOUT[name]}; warmed up, {_ask(runners[name])}")
        for number in range(options.rounds):
            outcome = {}
            for name in _rotated(names, number):
                outcome[name] = _ask(runners[name], options.seconds)
                rate, cpu = outcome[name]["rate"], outcome[name]["cpu_ms"]
                _say(f"round {number + 1}  {name:16} {rate:7.1f} pictures/s, {cpu:5.2f} ms of a core each")
            rounds.append(outcome)
    finally:
        for runner in runners.values():
            runner.kill()
    return rounds


def _rotated(names: list[str], number: int) -> list[str]:
    """Another one begins each round, so that nobody always follows the same."""
    return names[number % len(names) :] + names[: number % len(names)]


def _start(name: str, folder: Path, cores: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--contender", name, "--folder", str(folder), "--cores", str(cores)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    )


def _ask(runner: subprocess.Popen[str], seconds: float | None = None) -> Any:
    """The runner's next line; of a round of so many seconds, where they are given."""
    assert runner.stdin is not None
    assert runner.stdout is not None
    if seconds is not None:
        print(seconds, file=runner.stdin, flush=True)
    line = runner.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(map(str, runner.args))} ended with status {runner.wait()}")  # type: ignore[arg-type]
    return json.loads(line)


def _contend(name: str, folder: Path, cores: int) -> int:
    """One process of the race: an epoch to warm up and to check, then a round for each line that comes in."""
    from data_contenders import CONTENDERS, Epoch, pin

    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints
    pin(cores)
    epoch: Epoch = CONTENDERS[name](folder, cores)
    print(json.dumps(_checked(epoch, name, folder)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_round(epoch, float(line))), file=answers, flush=True)
    return 0


def _checked(epoch: Any, name: str, folder: Path) -> dict[str, int]:
    """Pictures and captions of the first epoch, which must be all of them."""
    import torch
    from data_contenders import BATCH, SIDE
    from data_files import CAPTIONS

    pictures = captions = 0
    for images, with_them in epoch():
        assert (*images.shape[1:], images.dtype) == (3, SIDE, SIDE, torch.uint8), (images.shape, images.dtype)
        assert images.float().std() > 10, "these are no pictures"
        pictures, captions = pictures + len(images), captions + with_them
    there = sum(1 for _ in (folder / "images").iterdir())
    expected = (
        -(-there // BATCH) * BATCH if name.startswith("dali") else there
    )  # its reader fills the last batch
    each = 1 if name in ("dali", "dali_crop", "webdataset") else CAPTIONS
    if (pictures, captions) != (expected, expected * each):
        raise SystemExit(f"{name} gave {pictures} pictures and {captions} captions of {there}")
    return {"pictures": pictures, "captions": captions}


def _round(epoch: Any, seconds: float) -> dict[str, float]:
    """Whole epochs, until so many seconds have passed."""
    pictures = epochs = 0
    used, begin = _cpu_seconds(), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        for images, _ in epoch():
            pictures += len(images)
        epochs += 1
    took, used = time.perf_counter() - begin, _cpu_seconds() - used
    return {"rate": pictures / took, "cpu_ms": 1000 * used / pictures, "epochs": epochs}


def _cpu_seconds() -> float:
    """Of this process and its loader processes."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in [own, *own.children(recursive=True)]]
    return float(sum(t.user + t.system for t in times))


def _report(rounds: list[dict[str, dict[str, float]]], about: dict[str, Any]) -> None:
    result = dict(about, rounds=len(rounds))
    print(f"\n{'':18}{'pictures/s':>12}{'ms of a core':>14}")
    for name in rounds[0]:
        rate, cpu = (statistics.median(r[name][key] for r in rounds) for key in ("rate", "cpu_ms"))
        print(f"{name:18}{rate:12.1f}{cpu:14.2f}  {ABOUT[name]}")
        result[f"{name}_pictures_per_s"], result[f"{name}_cpu_ms"] = round(rate, 1), round(cpu, 2)
    print(f"\n{'ratio':26}{'median':>8}{'least':>8}{'most':>8}{'by core time':>14}")
    for name, (ours, other) in RATIOS.items():
        if ours in rounds[0] and other in rounds[0]:
            ratios = [r[ours]["rate"] / r[other]["rate"] for r in rounds]
            by_cpu = statistics.median(r[other]["cpu_ms"] / r[ours]["cpu_ms"] for r in rounds)
            median = statistics.median(ratios)
            print(f"{name:26}{median:8.2f}{min(ratios):8.2f}{max(ratios):8.2f}{by_cpu:14.2f}")
            result[name], result[f"{name}_by_core_time"] = round(median, 3), round(by_cpu, 3)
    print(json.dumps(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
