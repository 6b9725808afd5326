"""Which samples make up which batch: a pure function of (seed, epoch), the same on every rank.

N samples, B of them in a batch of one rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from efficap.errors import InputError

Key = tuple[int, int]  # (which time through the data, sample)


class Order(Protocol):
    """The samples in the order of one time through the data."""

    size: int

    def samples(self, time: int, start: int, stop: int) -> NDArray[np.int64]:
        """The samples at places `start` … `stop` - 1 of the `time`-th time through."""
        ...


class Shuffled:
    """Another order each time."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._time, self._order = -1, np.empty(0, np.int64)

    def samples(self, time: int, start: int, stop: int) -> NDArray[np.int64]:
        if time != self._time:
            self._time, self._order = time, np.random.default_rng((self.seed, time)).permutation(self.size)
        return self._order[start:stop]


class ShuffledShards:
    """Another order of the shards each time, and of the samples within every few of them.

    Memory holds the order of one group of shards, however many samples there are.

    Args:
        counts: (S,) samples in each shard.
        group: shards whose samples are mixed with each other.
    """

    def __init__(self, counts: NDArray[np.int64], seed: int, group: int) -> None:
        self.counts, self.seed, self.group = counts, seed, group
        self.size = int(counts.sum())
        self._first = np.cumsum(counts) - counts  # (S,) number of each shard's first sample
        self._time = -1
        self._shards = self._group_starts = np.empty(0, np.int64)
        self._cached, self._order = (-1, -1), np.empty(0, np.int64)

    def samples(self, time: int, start: int, stop: int) -> NDArray[np.int64]:
        if time != self._time:
            self._time, self._shards = (
                time,
                np.random.default_rng((self.seed, time)).permutation(len(self.counts)),
            )
            ends = np.cumsum(self.counts[self._shards])
            self._group_starts = np.concatenate([[0], ends[self.group - 1 :: self.group]])
        parts = []
        while start < stop:
            number = int(np.searchsorted(self._group_starts, start, side="right")) - 1
            order = self._group(number)
            first = int(self._group_starts[number])
            end = min(stop, first + len(order))
            parts.append(order[start - first : end - first])
            start = end
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _group(self, number: int) -> NDArray[np.int64]:
        if (self._time, number) != self._cached:
            shards = self._shards[number * self.group : (number + 1) * self.group]
            samples = np.concatenate([np.arange(self.counts[s]) + self._first[s] for s in shards])
            self._order = np.random.default_rng((self.seed, self._time, number)).permutation(samples)
            self._cached = (self._time, number)
        return self._order


class BatchOrder(Sampler[list[Key]]):
    """The batches of one rank, epoch after epoch.

    All batches have B samples but the last two of an epoch, which share what is left: a batch of a few would give
    BatchNorm poor statistics, and leaving it out would lose them. Every rank has the same number of batches.

    Args:
        order: of the samples.
        batch_size: B.
        rank, world: this rank, and W.
        steps_per_epoch: batches that make an epoch, for data without end: the next epoch goes on where this one
            stopped, and round again. None: an epoch is once through the data.
        begun_by: ranks whose B samples each are a step's; None: W. Other ranks that go on with a training share the
            same samples.

    Attributes:
        epoch, first: an iteration gives the batches of this epoch, from this one on.
        lost: samples that an epoch leaves out, as W ranks cannot share them.
        largest: samples of a rank's largest batch.

    Raises:
        InputError: fewer samples than ranks, of all or of a step.
    """

    def __init__(
        self,
        order: Order,
        *,
        batch_size: int,
        rank: int,
        world: int,
        steps_per_epoch: int | None = None,
        begun_by: int | None = None,
    ) -> None:
        if order.size < world:
            raise InputError(
                f"{order.size} training pictures are fewer than the {world} processes that share them"
            )
        self.order, self.rank, self.world = order, rank, world
        self.steps_per_epoch = steps_per_epoch
        self.epoch = self.first = 0
        self._global = batch_size * (begun_by or world)  # samples of all ranks' batches together
        if self._global < world:
            raise InputError(
                f"a step's {self._global} pictures, as the training was begun with, are fewer than the {world} "
                "processes that share them; start fewer"
            )
        self.largest = -(-self._global // world)
        self._steps = -(-order.size // self._global)
        rest = order.size - max(0, self._steps - 2) * self._global
        self._last = [rest] if self._steps == 1 else [rest - rest // 2, rest // 2]
        self.lost = 0
        if self._last[-1] < max(world, begun_by or 0):  # not one for each rank
            self._steps, self._last, self.lost = self._steps - 1, [self._global], rest - self._global

    def __len__(self) -> int:
        return self.steps_per_epoch or self._steps

    def __iter__(self) -> Iterator[list[Key]]:
        return self.batches(self.epoch, self.first)

    def batches(self, epoch: int, first: int = 0) -> Iterator[list[Key]]:
        """The keys of an epoch's batches from batch `first` on."""
        for step in range(first, len(self)):
            if self.steps_per_epoch is not None:
                start = (epoch * self.steps_per_epoch + step) * self._global
                yield self._keys(start, self._global)
            else:
                start = epoch * self.order.size + min(step, self._steps - len(self._last)) * self._global
                tail = step - (self._steps - len(self._last))
                if tail >= 0:
                    yield self._keys(start + sum(self._last[:tail]), self._last[tail])
                else:
                    yield self._keys(start, self._global)

    def _keys(self, start: int, size: int) -> list[Key]:
        """This rank's part of `size` samples from place `start` of the endless repetition."""
        place, stop = start + size * self.rank // self.world, start + size * (self.rank + 1) // self.world
        keys: list[Key] = []
        while place < stop:
            time, within = divmod(place, self.order.size)
            end = min(self.order.size, within + stop - place)
            keys += [(time, int(sample)) for sample in self.order.samples(time, within, end)]
            place += end - within
        return keys


class EvaluationOrder(Sampler[list[Key]]):
    """Every sample once, in turn; a rank has its part of them without gaps, in as many batches as any other.

    Attributes:
        largest: samples of a rank's largest batch.

    Raises:
        InputError: fewer samples than ranks.
    """

    def __init__(self, size: int, *, batch_size: int, rank: int, world: int) -> None:
        if world > 1 and size < world:
            raise InputError(
                f"{size} pictures to be captioned are fewer than the {world} processes that share them"
            )
        self.part = range(size * rank // world, size * (rank + 1) // world)
        most = -(-size // world)  # samples of a rank
        self.count = min(-(-most // batch_size), size // world)
        self.batch_size, self.largest = batch_size, batch_size if world == 1 else max(2, batch_size)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[list[Key]]:
        rest = self.part
        for to_come in reversed(range(self.count)):  # each of which needs a sample
            batch = rest[: min(self.batch_size, len(rest) - to_come)] if to_come else rest
            rest = rest[len(batch) :]
            yield [(0, sample) for sample in batch]


def turn(count: int, wanted: int, *, seed: int, time: int, sample: int) -> list[int]:
    """`wanted` of the `count` captions of a sample without repeats, going round over the times so that all are used."""
    order = np.random.default_rng((seed, sample)).permutation(count)
    first = time * wanted % count
    return [int(order[(first + k) % count]) for k in range(min(wanted, count))]
