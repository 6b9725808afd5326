"""Run the benchmarks in short form and write their output into docs/benchmarks.md: `make bench`.

Each output goes between the page's markers ``<!-- bench: NAME -->`` and ``<!-- end -->``, with machine, date and
command.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
BENCHES = {
    "data": ["--short"],
    "data_memory": ["--short"],
    "data_start": ["--short"],
    "decode": ["--short"],
    "linear": [],
    "train_step": ["--short"],
    "feature_cache": ["--short"],
    "export": ["--short"],
    "serve": ["--short"],
}


def machine() -> str:
    """What the figures were measured on, in words."""
    names = {}
    if Path("/proc/cpuinfo").is_file():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        names = {key.strip(): value.strip() for key, _, value in lines}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {names.get('model name', platform.machine())}, {gpu}, torch {torch.__version__}"


def main() -> int:
    page = PAGE.read_text(encoding="utf-8")
    failed = []
    for name, options in BENCHES.items():
        command = [f"bench/{name}.py", *options]
        print(f"python {' '.join(command)}", flush=True)
        result = subprocess.run(
            [sys.executable, *command], cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=False
        )
        if result.returncode:
            failed.append(name)
            continue
        print(result.stdout, flush=True)
        today = datetime.datetime.now(datetime.UTC).date()
        text = f"{machine()}, {today}:\n\n```\n$ python {' '.join(command)}\n{result.stdout.rstrip()}\n```"
        pattern = rf"(<!-- bench: {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(
            pattern, lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page, flags=re.S
        )
        assert count == 1, f"{PAGE} lacks the markers of {name}"
        PAGE.write_text(page, encoding="utf-8")
    print(f"failed: {', '.join(failed)}" if failed else f"written to {PAGE}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
