"""The batches of a mixture of data sets: which set each comes from follows from the epoch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping

from efficap.batch import CaptionBatch
from efficap.data.loader import CheckedLoader


class MixedLoader(ABC):
    """Iterated by the trainer in place of one set's loader.

    Args:
        loaders: of the sets, by name.
        epoch: the epoch that training is in.
    """

    def __init__(self, loaders: Mapping[str, CheckedLoader], epoch: Callable[[], int]) -> None:
        self.loaders, self.epoch = loaders, epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def of_epoch(self, epoch: int) -> Iterator[CaptionBatch]:
        """The batches of an epoch of the mixture."""

    def __iter__(self) -> Iterator[CaptionBatch]:
        return self.of_epoch(self.epoch())


class InTurnLoader(MixedLoader):
    """One set after the other, each for `epochs` of its own."""

    def __init__(
        self, loaders: Mapping[str, CheckedLoader], epochs: Mapping[str, int], epoch: Callable[[], int]
    ) -> None:
        super().__init__(loaders, epoch)
        self.epochs = epochs

    def __len__(self) -> int:
        return sum(epochs * len(self.loaders[name]) for name, epochs in self.epochs.items())

    def of_epoch(self, epoch: int) -> Iterator[CaptionBatch]:
        for name, epochs in self.epochs.items():
            for own in range(epoch * epochs, (epoch + 1) * epochs):
                yield from self.loaders[name].of_epoch(own)


class WeightedLoader(MixedLoader):
    """Sets in a regular pattern by weight: with 3 and 1, three batches of the one to one of the other."""

    def __init__(
        self,
        loaders: Mapping[str, CheckedLoader],
        weights: Mapping[str, float],
        steps_per_epoch: int | None,
        epoch: Callable[[], int],
    ) -> None:
        super().__init__(loaders, epoch)
        self.steps = steps_per_epoch or sum(map(len, loaders.values()))
        self.pattern = list(_spread(weights, self.steps))
        self.counts = Counter(self.pattern)

    def __len__(self) -> int:
        return self.steps

    def of_epoch(self, epoch: int) -> Iterator[CaptionBatch]:
        streams = {name: _endless(self.loaders[name], epoch * count) for name, count in self.counts.items()}
        try:
            for name in self.pattern:
                yield next(streams[name])
        finally:
            for stream in streams.values():
                stream.close()


def _spread(weights: Mapping[str, float], steps: int) -> Iterator[str]:
    """Each name as often as its weight says, at every point as nearly as whole numbers allow."""
    given: Counter[str] = Counter()
    total = sum(weights.values())
    for step in range(1, steps + 1):
        name = max(weights, key=lambda name: step * weights[name] / total - given[name])
        given[name] += 1
        yield name


def _endless(loader: CheckedLoader, start: int) -> Generator[CaptionBatch]:
    """A loader's batches, epoch after epoch, from batch `start` of them all."""
    epoch, first = divmod(start, len(loader))
    while True:
        yield from loader.of_epoch(epoch, first)
        epoch, first = epoch + 1, 0
