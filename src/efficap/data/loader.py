"""What training and evaluation iterate: the batches of one data module, without the samples that turned out bad."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

from efficap.batch import CaptionBatch
from efficap.data.bad_samples import BadSamples
from efficap.data.order import BatchOrder, EvaluationOrder
from efficap.errors import InputError

BadReport = tuple[str, str, str]  # name, reason, detail
Place = tuple[int, int]  # epoch, batch of it


class Batches(Protocol):
    """Yields the batches of an order with what was bad in them; None for a batch of which nothing is left."""

    def __iter__(self) -> Iterator[tuple[CaptionBatch | None, list[BadReport]]]: ...


class Placed(Protocol):
    """A loader that knows which batch comes next."""

    place: Place

    def __iter__(self) -> Iterator[CaptionBatch]: ...

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[CaptionBatch]: ...


class CheckedLoader:
    """Batches whose bad samples are counted; too many of them are an `InputError`.

    There are as many as its length says, by which the trainer knows the end of an epoch and processes take the same
    number of steps: for a batch of which nothing is left another comes twice. A process that evaluates alone passes
    it over.

    Args:
        batches: what it wraps; their order is `order`.
        order: told the epoch as it begins: Lightning restores it only after the loaders are made.
        bad_samples: the counts.
        world: ranks.
        place: the epoch and its first batch that the next iteration begins with.

    Attributes:
        place: the epoch and the batch that come next.
    """

    def __init__(
        self,
        batches: Batches,
        order: BatchOrder | EvaluationOrder,
        bad_samples: BadSamples,
        *,
        world: int,
        place: Callable[[], Place],
    ) -> None:
        self.batches, self.order, self.bad_samples, self.world = batches, order, bad_samples, world
        self._begin = place
        self.place: Place = (0, 0)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[CaptionBatch]:
        # Lightning makes an iterator to count batches, before it knows where a resumed training is.
        yield from self.of_epoch(*self._begin())

    def close(self) -> None:
        """End the processes that load, where there are some; left to Python's collector, each takes five seconds."""
        iterator = getattr(self.batches, "_iterator", None)  # of a DataLoader whose workers persist
        if iterator is not None:
            iterator._shutdown_workers()
            self.batches._iterator = None  # type: ignore[attr-defined]

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[CaptionBatch]:
        """The batches of an epoch from batch `first` on."""
        keeps_length = self.world > 1
        if isinstance(self.order, BatchOrder):
            self.order.epoch, self.order.first = epoch, first
            keeps_length = True
        last, owed = None, 0  # batches at the start of which nothing is left
        for number, (batch, bad) in enumerate(self.batches, start=first):
            self.place = (epoch, number + 1)
            for name, reason, detail in bad:
                self.bad_samples.add(name, reason, detail)
            if bad:
                self.bad_samples.check()
            if batch is not None:
                last = batch
            if last is None:
                owed += 1
            elif batch is not None or keeps_length:
                yield from itertools.repeat(last, 1 + (owed if keeps_length else 0))
                owed = 0
        # Not where a resumed epoch had but its last batches to come.
        if owed and (first == 0 or self.world > 1):
            reason = self.bad_samples or "data.text leaves no caption of them"
            raise InputError(f"nothing of {owed:,} batches can be used: {reason}")
