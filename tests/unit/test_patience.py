"""Reading that never ends is given up; what is no file is not opened at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from efficap.data import pictures
from efficap.data.patience import TooSlowError, within
from efficap.data.pictures import Picture, PictureError


def test_what_comes_in_time_is_returned_and_what_fails_is_raised() -> None:
    assert within(5, lambda a, b: a + b, 1, 2) == 3
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)
    assert within(None, threading.get_ident) == threading.get_ident()
    assert within(5, threading.get_ident) == within(5, threading.get_ident) != threading.get_ident()


def test_what_is_too_late_is_left_to_itself() -> None:
    never = threading.Event()
    with pytest.raises(TooSlowError, match=r"not read within 0.05 s"):
        within(0.05, never.wait)
    assert within(5, lambda: "next") == "next", "and its late answer is not taken for another's"
    never.set()
    assert within(5, lambda: "after") == "after"


def test_an_interrupted_read_is_no_answer_to_the_next_one() -> None:
    let_go = threading.Event()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)  # as Ctrl-C

    def ask() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        within(5, lambda: let_go.wait() and "first")

    try:
        with pytest.raises(KeyboardInterrupt):
            ask()
    finally:
        signal.signal(signal.SIGALRM, before)
    let_go.set()  # and the first answer comes
    assert within(5, lambda: "second") == "second"
    assert within(5, lambda: "third") == "third"


def test_a_thread_that_waits_does_not_keep_the_process() -> None:
    code = """
from efficap.data.patience import TooSlowError, within
import threading
try:
    within(0.05, threading.Event().wait)
except TooSlowError:
    print("ended")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "ended\n"), result.stderr


def test_a_forked_process_reads_by_itself() -> None:
    within(5, lambda: None)
    child = os.fork()
    if not child:
        os._exit(within(5, lambda: 7))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_thread_that_ends_leaves_no_reader_of_its_own() -> None:
    def readers() -> int:
        return sum(thread.name == "efficap-reader" for thread in threading.enumerate())

    before = readers()
    for _ in range(3):
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda n: within(5, lambda: n), range(16))) == list(range(16))
    until = time.monotonic() + 10
    while readers() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert readers() <= before


def test_pipes_and_devices_are_no_pictures_and_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for file in (tmp_path / "pipe.jpg", Path("/dev/zero")):
        with pytest.raises(PictureError) as error:
            Picture(file)
        assert (error.value.reason, error.value.detail) == ("unreadable", "no regular file")


def test_a_picture_that_takes_too_long_is_a_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "slow.png"
    Image.new("RGB", (8, 8)).save(file)
    real = pictures.read_picture_file

    def slowly(*arguments: Any) -> bytes:
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(pictures, "read_picture_file", slowly)
    with pytest.raises(PictureError, match=r"too slow: not read within 0.05 s"):
        Picture(file, timeout=0.05)
    assert torch.equal(Picture(file, timeout=30).pixels(), torch.zeros(3, 8, 8, dtype=torch.uint8))
