"""The commands in processes of their own that can be killed, without the seconds in which Python imports torch.

They are forked, by the standard library's fork server, from a process that has imported everything and done nothing.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import traceback
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COMMANDS = [f"efficap.commands.{name}" for name in ("train", "evaluate", "caption")]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(_COMMANDS)


class Started:
    """``python SCRIPT SETTINGS``, in the project's folder and with one thread; what it prints is not kept.

    Args:
        script: ``train.py``, ``eval.py`` or ``caption.py``.
        settings: of the command line.
        environment: what is changed of this process's; None takes a variable away.
    """

    def __init__(self, script: str, *settings: str, **environment: str | None) -> None:
        with tempfile.NamedTemporaryFile(prefix="efficap-stderr-", delete=False) as file:
            self._errors = Path(file.name)
        atexit.register(self._errors.unlink)
        own = {name: value for name, value in os.environ.items() if name not in environment}
        own |= {name: value for name, value in environment.items() if value is not None}
        self._process: ForkServerProcess = _server.Process(
            target=_run, args=(script, settings, own, self._errors)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def errors(self) -> str:
        """What it has said on stderr so far."""
        return self._errors.read_text(errors="replace")

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


def _run(script: str, settings: tuple[str, ...], environment: dict[str, str], errors: Path) -> None:
    import torch

    for stream, file in ((1, Path(os.devnull)), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [script, *settings]
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # the usual one again
    torch.set_num_threads(1)  # OMP_NUM_THREADS is read as torch is imported
    status: object = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()  # what Python does at its end, and multiprocessing does not
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)  # type: ignore[arg-type]
