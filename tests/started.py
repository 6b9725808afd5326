"""The commands in processes of their own that can be killed, without the seconds in which Python imports torch.

They are forked, by the standard library's fork server, from a process that has imported everything and done nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
_COMMANDS = [f"efficap.commands.{name}" for name in ("train", "evaluate", "caption")]
_server = multiprocessing.get_context("forkserver")
# What a logger, shards and a search import as they begin, too; where one of these is absent it is passed over.
_LATER = ["wandb.sdk.launch", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch", "optuna"]
_server.set_forkserver_preload([*_COMMANDS, "pytest", *_LATER])
# There is one server for all of a process's pools: another's wish, such as the doctor's, would take its place.
multiprocessing.context.BaseContext.set_forkserver_preload = lambda *_: None  # type: ignore[assignment]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Half a second goes into curves and sheets of pictures, and at a training's start some into a line on memory."""
    nothing = Image.new("RGB", (1, 1))
    patch.setattr("efficap.training.run_metrics.plot_curves", lambda _, png: nothing.save(png))
    patch.setattr("efficap.commands.evaluate.contact_sheet", lambda png, _: nothing.save(png))
    patch.setattr("efficap.training.summary._activation_bytes", lambda *_: 0)


class Started:
    """``python SCRIPT SETTINGS``, with one thread.

    Args:
        script: ``train.py``, ``eval.py`` or ``caption.py``, or the path of another.
        settings: of the command line.
        cwd: where it is called; the project's folder.
        environment: what is changed of this process's; None takes a variable away.
    """

    def __init__(self, script: str, *settings: str, cwd: Path = ROOT, **environment: str | None) -> None:
        said = Path(tempfile.mkdtemp(prefix="efficap-started-"))  # conftest.py has it go
        self._streams = said / "stdout", said / "stderr"
        for stream in self._streams:
            stream.touch()
        own = {name: value for name, value in os.environ.items() if name not in environment}
        own |= {name: value for name, value in environment.items() if value is not None}
        self._process: ForkServerProcess = _server.Process(
            target=_run, args=(str(ROOT / script), settings, cwd, own, self._streams)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def printed(self) -> str:
        """What it has said on stdout so far."""
        return self._streams[0].read_text(errors="replace")

    @property
    def errors(self) -> str:
        """What it has said on stderr so far."""
        return self._streams[1].read_text(errors="replace")

    def is_alive(self) -> bool:
        return self._process.is_alive()

    @property
    def status(self) -> int | None:
        """Its exit status, or the signal that ended it, negative; None while it runs."""
        return self._process.exitcode

    def send(self, number: int) -> None:
        if self.is_alive():
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit status, or the signal that ended it, negative.

        Raises:
            TimeoutError: it goes on, and is killed.
        """
        self._process.join(seconds)
        status = self._process.exitcode
        if status is None:
            self.send(signal.SIGKILL)
            raise TimeoutError(f"it has not ended for {seconds} s; it said:\n{self.errors}")
        return status


@contextlib.contextmanager
def started_together(count: int, script: str, *settings: str, **options: Any) -> Iterator[list[Started]]:
    """Processes that are told what torchrun tells those that it starts; they meet at a store of this process.

    Nobody ends the others where one is gone, as torchrun does: they are killed as the block ends.

    Args:
        count: how many.
        script, settings, options: of each `Started`.
    """
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    told = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": "tests",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks = [
        Started(script, *settings, RANK=str(rank), LOCAL_RANK=str(rank), **told, **options)
        for rank in range(count)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.send(signal.SIGKILL)


def _run(
    script: str,
    settings: tuple[str, ...],
    cwd: Path,
    environment: dict[str, str],
    streams: tuple[Path, Path],
) -> None:
    import omegaconf._utils
    import torch

    from efficap.data import pool
    from efficap.evaluation import java

    for stream, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, str(Path(script).parent))
    sys.argv = [script, *settings]
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # the usual one again
    torch.set_num_threads(1)  # OMP_NUM_THREADS is read as torch is imported
    tempfile.tempdir = None  # likewise
    # What nobody looks at, and pools that would import everything once more.
    draw_nothing(pytest.MonkeyPatch())
    omegaconf._utils.yaml = SimpleNamespace(**{**vars(yaml), "SafeLoader": yaml.CSafeLoader})  # type: ignore[assignment]
    java._starts = lambda _: True  # type: ignore[assignment]  # else each asks `java -version`
    pool.get_context = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment]
    status: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    # What Python does at its end, in its order; multiprocessing alone would wait for a pool that nobody ends.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)  # type: ignore[arg-type]
