"""Trainings, the faults thrown at them, and what came of it."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from soak.faults import ENDING, PASSING, TRUNCATED, NotSurvivedError, can_be_truncated, truncate
from soak.training import Data, HangsError, Life, Training, differences


@dataclass
class Outcome:
    """What came of a soak.

    Attributes:
        thrown, survived: how many faults, by kind.
        trainings: how many were compared with an undisturbed one.
        processes: how many they took.
        problems: what did not end as promised; nothing where all is well.
    """

    seed: int
    thrown: Counter[str] = field(default_factory=Counter)
    survived: Counter[str] = field(default_factory=Counter)
    trainings: int = 0
    processes: int = 0
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Soak:
    """Throws faults at trainings on a table and on shards in turn, until so many are survived.

    Args:
        folder: of all that it writes; must be new.
        faults: how many.
        seed: of their kinds and times; how fast the machine is changes where in a training they hit.
        epochs: of each training.
        pause: seconds, at most, that a training is left alone before a fault.
        minutes: after so many no further training is begun; None: no limit.
        on_fault: told after each one that was survived.
    """

    def __init__(
        self,
        folder: Path,
        *,
        faults: int,
        seed: int,
        epochs: int,
        pause: float = 1.5,
        minutes: float | None = None,
        on_fault: Callable[[str], object] = lambda kind: None,
    ) -> None:
        self.folder, self.faults, self.epochs, self.on_fault = folder, faults, epochs, on_fault
        self.pause = pause
        self.until = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self.random, self.outcome = Random(seed), Outcome(seed)
        self._bag: list[str] = []

    def run(self) -> Outcome:
        began = time.monotonic()
        data = Data(self.folder)
        expected: dict[str, Path] = {}
        try:
            while self._left() and time.monotonic() < self.until:
                kind = ("csv", "shards")[self.outcome.trainings % 2]
                if kind not in expected:
                    expected[kind] = self._undisturbed(data, kind)
                training = Training(self._new_run(kind), data, kind, self.epochs)
                self._disturb(training, at_most=max(1, min(self._left(), -(-self.faults // 2))))
                self.outcome.trainings += 1
                differing = differences(training.run, expected[kind])
                self.outcome.problems += [f"{training.run.name} differs in {name}" for name in differing]
                shutil.rmtree(training.run)
        except (NotSurvivedError, HangsError) as error:
            self.outcome.problems.append(str(error))
        self.outcome.seconds = time.monotonic() - began
        return self.outcome

    def _left(self) -> int:
        return self.faults - self.outcome.survived.total()

    def _new_run(self, kind: str) -> Path:
        return self.folder / f"{kind}_{self.outcome.trainings}"

    def _undisturbed(self, data: Data, kind: str) -> Path:
        training = Training(self.folder / f"undisturbed_{kind}", data, kind, self.epochs)
        life = training.start()
        if life.end() != 0:
            raise NotSurvivedError(f"the undisturbed training ended with {life.errors}")
        return training.run

    def _disturb(self, training: Training, at_most: int) -> None:
        """One training to its end, through `at_most` faults."""
        target = self.outcome.survived.total() + at_most
        truncated = False
        while not training.is_finished():
            life = training.start()
            self.outcome.processes += 1
            if not life.wait_until_at_work():
                if life.end() != 0 or not training.is_finished():
                    raise NotSurvivedError(
                        f"a training ended before it was at work, and said:\n{life.errors}"
                    )
                return
            if truncated:
                if "going on from the one before" not in life.errors:
                    raise NotSurvivedError(f"a truncated checkpoint was not passed over:\n{life.errors}")
                self._survived(TRUNCATED)
            truncated = self._live(life, target)

    def _live(self, life: Life, target: int) -> bool:
        """Throw faults at a process until it ends; returns whether its last checkpoint was truncated then."""
        to_truncate, left = False, {*ENDING, *PASSING}
        if life.training.kind == "shards":
            left.discard("loader process killed")  # threads load them
        while life.is_alive() and self.outcome.survived.total() < target:
            kind = self._draw({*left, TRUNCATED} if not to_truncate else left)
            if kind == TRUNCATED:
                to_truncate = True
                continue
            time.sleep(self.random.uniform(0.1, self.pause))
            if not life.is_alive():
                break
            self.outcome.thrown[kind] += 1
            throw = ENDING.get(kind) or PASSING[kind]
            if throw(life, self.random):
                self._survived(kind)
            else:
                self.outcome.thrown[kind] -= 1  # the training was at its end
            left.discard(kind)
        status = life.end()
        if life.training.is_finished() or not to_truncate or not can_be_truncated(life):
            if status == 0 and not life.training.is_finished():
                raise NotSurvivedError(f"a training ended with 0 before its end:\n{life.errors}")
            return False
        truncate(life.training.last, self.random)
        self.outcome.thrown[TRUNCATED] += 1
        return True

    def _draw(self, possible: set[str]) -> str:
        """Each kind as often as the others, in a random order."""
        if not possible.intersection(self._bag):
            kinds = [*ENDING, *PASSING, TRUNCATED]
            self._bag += self.random.sample(kinds, len(kinds))
        kind = next(kind for kind in self._bag if kind in possible)
        self._bag.remove(kind)
        return kind

    def _survived(self, kind: str) -> None:
        self.outcome.survived[kind] += 1
        self.on_fault(kind)
