"""bench/pointing.py: where words point, by maps whose answer is known."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

FILE = Path(__file__).parents[2] / "bench" / "pointing.py"


@pytest.fixture(scope="module")
def pointing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pointing", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pointing"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_words_that_look_into_their_box_hit_and_chance_is_its_area(pointing: ModuleType) -> None:
    upper = pointing.places(pd.DataFrame({"left": [0.0], "top": [0.0], "right": [0.5], "bottom": [0.25]}))
    lower = pointing.places(pd.DataFrame({"left": [0.5], "top": [0.5], "right": [1.0], "bottom": [1.0]}))
    assert (upper.mean(), lower.mean()) == (0.125, 0.25)
    maps = np.zeros((4, 4, 4), np.float32)
    maps[0, 0, 1] = maps[1, 3, 3] = maps[2, 0, 0] = maps[3, 1, 1] = 1.0
    words = [
        pointing.Naming("a", "colour", 1, upper, lower, maps[:1][None]),  # hits
        pointing.Naming("b", "colour", 1, lower, upper, maps[1:2][None]),  # hits
        pointing.Naming("c", "shape", 1, lower, upper, maps[2:3][None]),  # hits the other
        pointing.Naming("d", "shape", 1, upper, lower, maps[3:][None]),  # hits nothing
    ]
    found = pointing.measured(words, list(maps), np.ones(4, bool))
    assert (found["hits"], found["own"], found["other"], found["inside"]) == (0.5, 0.5, 0.25, 0.5)
    assert found["chance"] == pytest.approx(0.1875, abs=1e-3)
    assert found["times"] == pytest.approx(0.5 / 0.1875, abs=1e-3)
    # Of the other pictures' words, upper boxes are hit by 1 of 3 (a: c's) and 2 of 3 (d: a's and c's), …
    assert found["middle"] == pytest.approx((1 / 3 + 0 + 1 / 3 + 2 / 3) / 4, abs=1e-3)


def test_the_finer_point_lies_between_positions_that_share_the_attention(pointing: ModuleType) -> None:
    map_ = np.zeros((4, 4), np.float32)
    map_[1, 1], map_[1, 2] = 0.5, 0.5
    assert pointing.pointed_at(map_) == 48 * 128 + 48
    assert pointing.pointed_at(map_, finer=True) == 48 * 128 + 64
