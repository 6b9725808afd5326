"""The soak test in short: four faults of different kinds, two on a table and two on shards."""

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
    # Faults that follow each other sooner than in `make soak` fit into shorter trainings. Each kind has a test of its
    # own (test_faults.py, test_resume.py, test_webdataset.py); here it is that they come together.
    outcome = Soak(tmp_path, faults=4, seed=1, epochs=4, pause=0.6).run()
    assert not outcome.problems
    assert outcome.survived.total() >= 4
    assert len(outcome.survived) >= 3, "of eight kinds"
