"""The demo's ``POST /caption`` under load, on loopback alone: many clients at once against one that asks over and over.

    python bench/serve.py [--run RUN] [--clients 32] [--seconds 60] [--question decoding=greedy] [--short]

Without a run: `tiny`'s sizes with random weights, whose captions are 32 tokens long. Pictures are photograph-like JPEGs
of 640 x 480. Clients are threads of this process, on the same cores as the server. One client asks for a third of the
time, then all of them. An answer other than 200 or 503 ends the run with an error. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hydra
import numpy as np
import torch
from PIL import Image, ImageFilter

from efficap.commands.entry import CONF, plain
from efficap.commands.run_dir import write_run
from efficap.models.build import build_model, resolve_model
from efficap.models.weights import save_weights
from efficap.tokenizer import CaptionTokenizer

PICTURES = 16


def photographs() -> list[bytes]:
    """JPEGs with as much detail as photographs have, and of about their size."""
    files = []
    for seed in range(PICTURES):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        noise = rng.integers(-24, 25, (480, 640, 3))
        smooth = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC))
        picture = Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))
        file = io.BytesIO()
        picture.filter(ImageFilter.GaussianBlur(1)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_random_run(folder: Path) -> Path:
    """A run directory of `tiny`'s sizes, with random weights."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", ["model=tiny", "name=random", f"output_dir={folder}"])
    config = plain(cfg)
    config["model"] = resolve_model(config["model"])
    tokenizer = CaptionTokenizer.learn(["a brown dog runs on the beach"], vocab_size=1000)
    write_run(folder, config, tokenizer)
    torch.manual_seed(0)
    save_weights(build_model(config["model"], tokenizer.vocab_size).state_dict(), folder)
    return folder


@contextlib.contextmanager
def server(run: Path) -> Iterator[int]:
    """The command in a process of its own; its port."""
    command = [sys.executable, "-m", "efficap.demo", f"run={run}", "port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                sys.exit("the server did not start")
            yield int(line.split()[0].rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(30)


class Load:
    """Clients that ask, each again as soon as it is answered.

    Attributes:
        answers: how many of each status.
        times: seconds that each answered question took.
        errors: what went wrong besides.
    """

    def __init__(self, port: int, path: str, pictures: list[bytes]) -> None:
        self.port, self.path, self.pictures = port, path, pictures
        self.answers: Counter[int] = Counter()
        self.times: list[float] = []
        self.errors: list[str] = []

    def run(self, clients: int, seconds: float) -> Load:
        end = time.perf_counter() + seconds
        threads = [threading.Thread(target=self._ask, args=(number, end)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.seconds = seconds + max(0.0, time.perf_counter() - end)
        return self

    def _ask(self, number: int, end: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        while (start := time.perf_counter()) < end:
            try:
                connection.request("POST", self.path, self.pictures[number % len(self.pictures)])
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                return
            self.answers[answer.status] += 1
            if answer.status == 200:
                self.times.append(time.perf_counter() - start)
            elif answer.status == 503:
                time.sleep(float(answer.getheader("Retry-After", "1")))
            else:
                self.errors.append(f"{answer.status}: {body[:200]!r}")
                return
            number += 1

    @property
    def per_second(self) -> float:
        return len(self.times) / self.seconds

    def percentile(self, percent: int) -> float:
        """Milliseconds."""
        return 1000 * statistics.quantiles(self.times, n=100, method="inclusive")[percent - 1]

    def show(self, name: str) -> None:
        statuses = ", ".join(f"{count:,} x {status}" for status, count in sorted(self.answers.items()))
        print(
            f"{name:<12}{self.per_second:7.1f} captions/s   median {self.percentile(50):6.0f} ms   "
            f"95 % within {self.percentile(95):6.0f} ms   {statuses}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="a trained run, instead of random weights")
    parser.add_argument("--clients", type=int, default=32, help="at once (default: 32)")
    parser.add_argument("--seconds", type=float, default=60, help="that all of them ask (default: 60)")
    parser.add_argument("--question", default="decoding=greedy", help="settings (default: decoding=greedy)")
    parser.add_argument("--short", action="store_true", help="9 seconds")
    options = parser.parse_args()
    seconds = 9 if options.short else options.seconds
    path, pictures = f"/caption?{options.question}", photographs()
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or write_random_run(Path(folder) / "run")
        with server(run) as port:
            Load(port, path, pictures).run(options.clients, 1)  # and everything is warm
            alone = Load(port, path, pictures).run(1, seconds / 3)
            alone.show("1 client")
            many = Load(port, path, pictures).run(options.clients, seconds)
            many.show(f"{options.clients} clients")
    result = {
        "clients": options.clients,
        "seconds": seconds,
        "per_second": round(many.per_second, 1),
        "alone_per_second": round(alone.per_second, 1),
        "ratio": round(many.per_second / alone.per_second, 2),
        "p95_ms": round(many.percentile(95)),
        "refused": many.answers[503],
        "errors": len(alone.errors) + len(many.errors),
    }
    for error in (*alone.errors, *many.errors):
        print(error, file=sys.stderr)
    print(json.dumps(result))
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
