"""A precision that this CPU would only emulate is named, with the faster one, or the faster one is taken."""

from __future__ import annotations

import pytest

from efficap.commands.placement import say_if_slow, used_precision


@pytest.mark.parametrize(
    ("asked", "emulated", "used", "said"),
    [
        ("bf16-mixed", True, "32-true", "trainer.precision=bf16-mixed is 32-true on this CPU"),
        ("bf16-mixed", False, "bf16-mixed", ""),
        ("32-true", True, "32-true", ""),
        (None, True, "32-true", ""),
    ],
)
def test_a_training_does_not_compute_in_emulated_bfloat16_unawares(
    asked: str | None,
    emulated: bool,
    used: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("efficap.commands.placement.bfloat16_is_slow", lambda: emulated)
    trainer = {"accelerator": "cpu", "precision": asked}
    say_if_slow(trainer)
    error = capsys.readouterr().err
    assert used_precision(trainer) == used
    assert said in error
    assert bool(error) == bool(said)
