"""What the demo is asked on its command line: mistakes, names of runs, and what it listens at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import compose, write_random_run

from efficap.demo.serve import build_service, listen, serve
from efficap.errors import InputError


def settings(*overrides: str) -> dict[str, Any]:
    return compose("demo", "accelerator=cpu", *overrides)


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"host=127.0.0.1 port={port} cannot be listened at .*port=0"):
            serve(settings("run=missing", f"port={port}"))


def test_it_listens_to_this_machine_alone_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings("run=missing")
    with listen(cfg["host"], 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    assert not capsys.readouterr().err
    with listen("0.0.0.0", 0):
        assert "whoever reaches this machine can use it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=missing", "run=missing does not exist"),
        ("run=[]", "run=.* names no run"),
        ("max_batch=0", "max_batch=0 must be above 0"),
        ("examples=missing", "examples=missing is neither a file"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    pytest.importorskip("gradio", reason="the demo's packages are not installed: pip install 'efficap[demo]'")
    with pytest.raises(InputError, match=message):
        serve(settings("run=missing", "port=0", override))


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_random_run(tmp_path / name, f"name={name[0]}") for name in ("a1", "b", "a2")]
    service = build_service(settings(f"run=[{','.join(map(str, runs))}]"))
    assert list(service.captioners) == ["a-1", "b", "a-3"]
    assert [captioner.run.path for captioner in service.captioners.values()] == runs
