"""A short form of `make fuzz`: the same examples each time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from fuzz.kinds import REFUSED, USED, Kind, fuzz
from fuzz.overrides import OVERRIDES
from fuzz.runs import RUNS
from fuzz.sandbox import Sandbox
from fuzz.shards import SHARDS
from fuzz.tables import TABLES

from efficap.errors import InputError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "examples"),
    [(TABLES, 75), (SHARDS, 75), (OVERRIDES, 8), (RUNS, 40)],
    ids=["tables", "shards", "overrides", "runs"],
)
def test_random_input_is_used_or_refused_in_one_line_and_nothing_outside_is_touched(
    kind: Kind, examples: int, tmp_path: Path
) -> None:
    counts: Counter[str] = Counter()
    fuzz(kind, tmp_path / "sandbox", examples=examples, counts=counts)
    assert counts.total() >= examples // 2
    assert counts[USED] > 0, "examples that are refused at once tell nothing"
    assert counts[REFUSED] > 0 or kind is SHARDS, "a broken sample is left out, and not refused"


@pytest.mark.parametrize(
    ("use", "seen"),
    [
        (
            lambda sandbox: (sandbox.outside / "canary.txt").read_text(),
            "a file outside of the root was read|read",
        ),
        (lambda sandbox: (sandbox.outside / "new").write_text("x"), "a file outside of the root"),
        (lambda sandbox: (sandbox.outside / "canary.csv").unlink(), "a file outside of the root"),
        (lambda sandbox: (sandbox.root.parent / "elsewhere").mkdir(), "write"),
        (lambda sandbox: __import__("subprocess").run(["true"]), "start"),
    ],
)
def test_the_watch_sees_what_it_is_to_see(use: object, seen: str, tmp_path: Path) -> None:
    sandbox = Sandbox(tmp_path / "sandbox")
    sandbox.clear()
    with pytest.raises(AssertionError, match=seen), sandbox.watching():
        use(sandbox)  # type: ignore[operator]


def test_a_traceback_is_a_failure(tmp_path: Path) -> None:
    def use(example: tuple[str, bytes], sandbox: Sandbox) -> object:
        def fail() -> None:
            raise InputError("refused") if example[0].endswith("csv") else KeyError(example)

        return fail

    broken = Kind("broken", TABLES.examples, use)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        fuzz(broken, tmp_path / "sandbox", examples=100, counts=Counter())
