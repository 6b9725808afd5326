"""A stage of a training: how far the training is as it begins, and whether another one follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A training without stages is one of no name.

    Attributes:
        name: None where there are no stages.
        number: from 0.
        is_last: whether the training ends with it.
        steps, epochs: optimiser steps and epochs of the stages before; one that was begun counts.
    """

    name: str | None = None
    number: int = 0
    is_last: bool = True
    steps: int = 0
    epochs: int = 0

    @classmethod
    def first(cls, names: Sequence[str | None]) -> Stage:
        return cls(names[0], is_last=len(names) == 1)

    def next(self, names: Sequence[str | None], *, steps: int, epochs: int) -> Stage:
        """The stage after this one, which took so many steps and epochs."""
        number = self.number + 1
        return Stage(
            names[number], number, number + 1 == len(names), self.steps + steps, self.epochs + epochs
        )
