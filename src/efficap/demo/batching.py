"""The queue: items that many ask for at once, worked on in batches by one thread. It knows neither HTTP nor models."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")

LONGEST_WAIT = 60  # seconds that somebody is asked to wait before the next try
_FIRST_GUESS = 0.5  # seconds that an item takes, before one was worked on
_MEMORY = 0.8  # share of the past in the mean of these times


class OverloadError(Exception):
    """All places are taken.

    Attributes:
        retry_after: whole seconds after which a place should be free.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too much is asked for at once; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Key, Item, Result]):
    key: Key
    item: Item
    done: asyncio.Future[Result]


class BatchQueue(Generic[Key, Item, Result]):
    """Items of the same key share a batch; the one that has waited longest is in the next.

    Nobody waits for a batch to fill up: what comes while one is worked on makes the next.

    Args:
        work: of a key and at most `max_batch` of its items, the result of each, in order; called in a thread of its
            own, one batch at a time.
        max_batch: items.
        max_places: that `place` gives away at a time.
    """

    def __init__(
        self, work: Callable[[Key, list[Item]], Sequence[Result]], *, max_batch: int, max_places: int
    ) -> None:
        self._work, self._max_batch, self._max_places = work, max_batch, max_places
        self._waiting: deque[_Entry[Key, Item, Result]] = deque()
        self._has_more = asyncio.Event()
        self._taken = 0
        self._seconds_each = _FIRST_GUESS

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place, to be held from before anything is read until the result is there.

        Raises:
            OverloadError: there is none.
        """
        if self._taken >= self._max_places:
            seconds = math.ceil(self._taken * self._seconds_each)
            raise OverloadError(min(max(1, seconds), LONGEST_WAIT))
        self._taken += 1
        try:
            yield
        finally:
            self._taken -= 1

    async def submit(self, key: Key, item: Item) -> Result:
        """The item's result. Who is cancelled while waiting leaves the queue.

        Raises:
            Exception: whatever the work on its batch raised.
        """
        entry = _Entry(key, item, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._has_more.set()
        return await entry.done

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Work while the context is open; who still waits when it is left is cancelled."""
        with ThreadPoolExecutor(1, thread_name_prefix="captions") as thread:
            worker = asyncio.create_task(self._run(thread))
            try:
                yield
            finally:
                worker.cancel()
                for entry in self._waiting:
                    entry.done.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await worker

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._has_more.wait()
            batch = self._take()
            if not batch:
                self._has_more.clear()
                continue
            start = time.monotonic()
            try:
                items = [entry.item for entry in batch]
                results = await loop.run_in_executor(thread, self._work, batch[0].key, items)
                assert len(results) == len(batch)
            except Exception as error:
                for entry in batch:
                    if not entry.done.done():
                        entry.done.set_exception(error)
            else:
                for entry, result in zip(batch, results, strict=True):
                    if not entry.done.done():
                        entry.done.set_result(result)
            finally:
                for entry in batch:
                    entry.done.cancel()  # without effect on those that are done
            each = (time.monotonic() - start) / len(batch)
            self._seconds_each = _MEMORY * self._seconds_each + (1 - _MEMORY) * each

    def _take(self) -> list[_Entry[Key, Item, Result]]:
        """The next batch, taken from those that wait; whoever was cancelled is left out."""
        batch: list[_Entry[Key, Item, Result]] = []
        others: deque[_Entry[Key, Item, Result]] = deque()
        for entry in self._waiting:
            if entry.done.done():
                continue
            fits = len(batch) < self._max_batch and (not batch or entry.key == batch[0].key)
            (batch if fits else others).append(entry)
        self._waiting = others
        return batch
