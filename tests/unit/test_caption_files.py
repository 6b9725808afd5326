"""Which files captioning takes, and what it says of them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from efficap.commands.caption_folder import CaptionedFile, print_outcome


@pytest.mark.parametrize(("encoding", "name"), [("utf-8", "né\udce9.jpg"), ("latin-1", "né—.jpg")])
def test_a_files_name_that_the_terminal_cannot_show_is_escaped(
    encoding: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding, errors="strict"))
    print_outcome(Path("out"), [CaptionedFile(Path(name), error="no picture")], before=0)
    sys.stdout.flush()
    [first, second] = shown.getvalue().decode(encoding).splitlines()
    assert (
        first == "no picture: " + name.replace("\udce9", r"\udce9").replace("—", r"\u2014") + " (no picture)"
    )
    assert second.startswith("0 captioned, 1 left out; in out")
