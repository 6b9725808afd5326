"""The soak test in short: ten faults of all kinds, on a table and on shards."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from soak.soak import Soak

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    sys.platform != "linux", reason="limits another process's files and finds its children in /proc"
)
def test_trainings_that_faults_hit_end_with_the_weights_of_undisturbed_ones(tmp_path: Path) -> None:
    outcome = Soak(tmp_path, faults=10, seed=0, epochs=8).run()
    assert not outcome.problems
    assert outcome.survived.total() >= 10
    assert outcome.trainings >= 2
