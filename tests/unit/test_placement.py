"""A precision that is slow where it was asked for is named, with the faster one."""

from __future__ import annotations

import pytest

from efficap.commands.placement import say_if_slow


@pytest.mark.parametrize(
    ("precision", "emulated", "said"),
    [
        ("bf16-mixed", True, "trainer.precision=32-true is faster"),
        ("bf16-true", True, "trainer.precision=32-true is faster"),
        ("bf16-mixed", False, ""),
        ("32-true", True, ""),
        (None, True, ""),
    ],
)
def test_a_training_in_emulated_bfloat16_says_so(
    precision: str | None,
    emulated: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("efficap.commands.placement.bfloat16_is_slow", lambda: emulated)
    say_if_slow({"accelerator": "cpu", "precision": precision})
    error = capsys.readouterr().err
    assert said in error
    assert bool(error) == bool(said)
