"""The batches of a mixture of data sets: which set each comes from follows from the epoch alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping

from efficap.batch import CaptionBatch
from efficap.data.loader import CheckedLoader, Place


class MixedLoader(ABC):
    """Iterated by the trainer in place of one set's loader.

    Args:
        loaders: of the sets, by name.
        place: the epoch of the mixture and its first batch that the next iteration begins with.

    Attributes:
        place: the epoch and the batch that come next.
    """

    def __init__(self, loaders: Mapping[str, CheckedLoader], place: Callable[[], Place]) -> None:
        self.loaders, self._begin = loaders, place
        self.place: Place = (0, 0)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[CaptionBatch]:
        """The batches of an epoch of the mixture from batch `first` on."""

    def __iter__(self) -> Iterator[CaptionBatch]:
        epoch, first = self._begin()
        for number, batch in enumerate(self.of_epoch(epoch, first), start=first):
            self.place = (epoch, number + 1)
            yield batch


class InTurnLoader(MixedLoader):
    """One set after the other, each for `epochs` of its own."""

    def __init__(
        self, loaders: Mapping[str, CheckedLoader], epochs: Mapping[str, int], place: Callable[[], Place]
    ) -> None:
        super().__init__(loaders, place)
        self.epochs = epochs

    def __len__(self) -> int:
        return sum(epochs * len(self.loaders[name]) for name, epochs in self.epochs.items())

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[CaptionBatch]:
        for name, epochs in self.epochs.items():
            for own in range(epoch * epochs, (epoch + 1) * epochs):
                batches = len(self.loaders[name])
                if first < batches:
                    yield from self.loaders[name].of_epoch(own, first)
                first = max(0, first - batches)


class WeightedLoader(MixedLoader):
    """Sets in a regular pattern by weight: with 3 and 1, three batches of the one to one of the other."""

    def __init__(
        self,
        loaders: Mapping[str, CheckedLoader],
        weights: Mapping[str, float],
        steps_per_epoch: int | None,
        place: Callable[[], Place],
    ) -> None:
        super().__init__(loaders, place)
        self.steps = steps_per_epoch or sum(map(len, loaders.values()))
        self.pattern = list(_spread(weights, self.steps))
        self.counts = Counter(self.pattern)

    def __len__(self) -> int:
        return self.steps

    def of_epoch(self, epoch: int, first: int = 0) -> Iterator[CaptionBatch]:
        done = Counter(self.pattern[:first])
        streams = {
            name: _endless(self.loaders[name], epoch * count + done[name])
            for name, count in self.counts.items()
        }
        try:
            for name in self.pattern[first:]:
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
