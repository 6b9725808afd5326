"""The soak test in short: as many faults as there are kinds, on a table and on shards."""

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
    # Faults that follow each other sooner than in `make soak` fit into shorter trainings. By this seed each kind is
    # drawn once, and the end of a loader process, of which a table alone has some, among the first four.
    outcome = Soak(tmp_path, faults=8, seed=1, epochs=5, pause=0.6).run()
    assert not outcome.problems
    assert outcome.survived.total() >= 8
    assert len(outcome.survived) >= 6, "of eight kinds"
