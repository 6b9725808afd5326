"""Paths of a command line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from efficap.files import path_argument


def test_a_home_directory_is_found_also_behind_an_equals_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=path_argument)
    assert parser.parse_args(["--dir=~/data"]).dir == tmp_path / "data"
    with pytest.raises(SystemExit):
        parser.parse_args(["--dir=~nobody-of-this-name/data"])
    assert "argument --dir: ~nobody-of-this-name/data: there is no such home" in capsys.readouterr().err
