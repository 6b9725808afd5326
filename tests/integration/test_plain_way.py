"""What the benchmarks compare with, timm's and transformers' models put together, computes the same."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_loss_and_gradients_are_those_of_timm_and_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    bench = importlib.import_module("train_step")
    monkeypatch.setitem(bench.PICTURES, "b0", 4)
    assert max(bench.differences("b0").values()) < 1e-4
