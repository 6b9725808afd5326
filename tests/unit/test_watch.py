"""A training watched in the terminal: what is shown of its files, and when the watching ends."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from efficap.errors import InputError
from efficap.evaluation.pictures import PictureRecord, write_pictures
from efficap.training.progress import LOCK_FILE, SAMPLES_FILE, at_work, begun
from efficap.training.terminal_plot import Curve, plot
from efficap.training.watch import FINISHED, STOPPED, TRAINING, duration, main, read_run, screen, watch

HOLD = "import sys; from efficap.training.progress import begun; from pathlib import Path\n"
HOLD += "with begun(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run after 40 of 160 steps: 1,000 pairs at 10 a second."""
    (tmp_path / "config.yaml").write_text("name: small-csv\n")
    pd.DataFrame(
        {
            "step": [9, 19, 29, 39, 39],
            "epoch": [0, 0, 1, 1, 1],
            "train/loss": [4.0, 3.0, 2.5, 2.25, None],
            "train/pairs": [250, 500, 750, 1000, None],
            "train/pairs_per_second": [10, 10, 10, 10, None],
            "train/progress": [0.0625, 0.125, 0.1875, 0.25, None],
            "val/CIDEr": [None, None, None, None, 0.875],
        }
    ).to_csv(tmp_path / "metrics.csv", index=False)
    records = [PictureRecord("dog.jpg", "a [b]dog", ["a brown dog"])]
    write_pictures(tmp_path / SAMPLES_FILE, records)
    return tmp_path


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that trains, for all that others can see."""
    command = [sys.executable, "-c", HOLD, str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def shown(run: Path) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen(read_run(run), console.width, samples=3))
    return console.export_text()


def test_the_time_left_of_a_stage_counts_from_its_beginning(run: Path) -> None:
    """After 100 s of the first stage, 10 s of the second from 5 to 10 % on: 180 s are left."""
    log = pd.read_csv(run / "metrics.csv")
    log["train/progress"] *= 4
    rows = {
        "step": [49, 59],
        "train/pairs": [1100, 1200],
        "train/pairs_per_second": 10,
        "train/progress": [0.05, 0.1],
    }
    pd.concat([log, pd.DataFrame(rows)[:1]]).to_csv(run / "metrics.csv", index=False)
    assert read_run(run).seconds_left is None
    pd.concat([log, pd.DataFrame(rows)]).to_csv(run / "metrics.csv", index=False)
    assert read_run(run).seconds_left == pytest.approx(180)


def test_the_screen_tells_speed_time_left_scores_and_captions(run: Path) -> None:
    with begun(run):
        text = shown(run)
    assert text.split()[:2] == ["small-csv", "training"]
    for part in ("step 40", "pairs 1,000", "pairs/s 10", "for 2 min", "left about 5 min", "val/CIDEr 0.875"):
        assert part in " ".join(text.split())
    assert "dog.jpg  a [b]dog  a brown dog" in text


def test_a_run_is_training_as_long_as_a_process_holds_it(run: Path, holder: subprocess.Popen[str]) -> None:
    assert at_work(run)
    assert read_run(run).state == TRAINING
    with (
        pytest.raises(InputError, match=rf"^{run}: another process trains in it; wait for its end"),
        begun(run),
    ):
        pytest.fail("two trainings have the same run")
    assert at_work(run)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not at_work(run)
    assert read_run(run).state == STOPPED
    (run / "metrics.json").write_text(json.dumps({"finished": True}))
    assert read_run(run).state == FINISHED


def test_a_process_that_loads_pictures_does_not_hold_the_run_of_a_training_that_is_gone(run: Path) -> None:
    forked = multiprocessing.get_context("fork")
    is_up = forked.Event()
    with begun(run):
        loader = forked.Process(target=lambda: (is_up.set(), time.sleep(60)))
        loader.start()
        assert is_up.wait(10)
        assert at_work(run)
    assert loader.is_alive()
    assert not at_work(run)
    loader.kill()
    loader.join()


def test_who_looks_does_not_keep_a_training_from_its_run(run: Path) -> None:
    with begun(run):
        pass
    with (run / LOCK_FILE).open("r+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert not at_work(run), "two may look at a time"
        threading.Timer(0.01, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with begun(run):
            assert at_work(run)


def test_looking_at_a_run_leaves_no_trace_in_it(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    shown(run)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("finished", [True, False])
def test_watching_ends_with_the_process(run: Path, holder: subprocess.Popen[str], finished: bool) -> None:
    (run / "metrics.json").write_text(json.dumps({"finished": finished}))
    threading.Timer(0.3, holder.kill).start()
    last = watch(run, Console(file=open("/dev/null", "w")), every=0.05, samples=1)  # noqa: SIM115
    assert last.state == (FINISHED if finished else STOPPED)
    assert main([str(run)]) == (0 if finished else 1)


def test_files_that_are_half_written_show_what_was_there_before(run: Path) -> None:
    before = read_run(run)
    (run / "metrics.csv").write_text("")
    (run / SAMPLES_FILE).write_text('{"image_id": "dog.j')
    now = read_run(run, before)
    assert now.last("val/CIDEr") == 0.875
    assert now.samples == before.samples


def test_a_run_before_its_first_step_is_shown(run: Path) -> None:
    (run / "metrics.csv").unlink()
    (run / SAMPLES_FILE).unlink()
    with begun(run):
        assert "no step is logged yet" in shown(run)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"holds no config.yaml"):
        read_run(tmp_path)
    assert main([str(tmp_path), "--once"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_curve_goes_through_its_values() -> None:
    values = pd.Series(np.linspace(2, 1, 11), index=np.arange(0, 110, 10))
    lines = plot([Curve(values, "blue")], width=30, height=5, last_step=100).plain.split("\n")
    assert len(lines) == 5
    assert [line[0] for line in lines] == ["2", " ", " ", " ", "1"]
    dots = np.array([[ord(letter) - 0x2800 for letter in line[-28:]] for line in lines])
    columns = [np.flatnonzero(dots[:, column]).mean() for column in range(28)]
    expected = np.linspace(0, 4, 28)  # straight from the upper left to the lower right
    assert np.abs(np.array(columns) - expected).max() <= 0.6


def test_values_that_are_not_finite_are_left_out_of_a_curve() -> None:
    values = pd.Series([2.0, np.inf, 1.0, -np.inf, np.nan], index=range(5))
    finite = pd.Series([2.0, 1.0], index=[0, 2])
    drawn, expected = (plot([Curve(v, "red")], 30, 5, last_step=4).plain for v in (values, finite))
    assert drawn == expected


def test_a_time_between_looks_that_is_none_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--every", "0"]) == 1
    assert capsys.readouterr().err == "error: --every 0 must be above 0 seconds\n"


def test_nothing_and_a_single_value_are_plotted_too() -> None:
    assert plot([Curve(pd.Series(dtype=float), "red")], 30, 5, last_step=0).plain == "nothing yet"
    assert plot([Curve(pd.Series([3.0], index=[0]), "red")], 30, 5, last_step=0).plain.count("\u2801") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (120, "2 min"), (5999, "1 h 40 min"), (11_100, "3 h 05 min")],
)
def test_durations_are_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
