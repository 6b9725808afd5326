"""The demo's queue: what shares a batch, who comes next, and that nobody's mistake or absence holds up the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from efficap.demo.batching import BatchQueue, OverloadError

Queue = BatchQueue[str, int, int]


class Work:
    """Doubles numbers, keeps what it was given, and waits in each batch until it is let go."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.go = threading.Semaphore(0)

    def __call__(self, key: str, items: list[int]) -> list[int]:
        self.batches.append((key, items))
        assert self.go.acquire(timeout=10)
        if key == "broken":
            raise ValueError("broken")
        return [2 * item for item in items]


def run(test: Callable[[Queue, Work], Awaitable[None]], **options: Any) -> Work:
    async def main() -> None:
        queue = Queue(work, **{"max_batch": 3, "max_places": 10, **options})
        async with queue.running():
            await asyncio.wait_for(test(queue, work), 10)

    work = Work()
    asyncio.run(main())
    return work


async def busy(queue: Queue, work: Work) -> asyncio.Task[int]:
    """A first item, which is being worked on."""
    task = asyncio.create_task(queue.submit("first", 0))
    while not work.batches:
        await asyncio.sleep(0.001)
    return task


async def waiting(queue: Queue, *items: tuple[str, int]) -> list[asyncio.Task[int]]:
    """Items that wait, in this order."""
    tasks = [asyncio.create_task(queue.submit(*item)) for item in items]
    await asyncio.sleep(0.01)
    return tasks


def test_what_comes_while_a_batch_is_worked_on_makes_the_next() -> None:
    async def test(queue: Queue, work: Work) -> None:
        first = await busy(queue, work)
        others = await waiting(queue, ("a", 1), ("a", 2), ("a", 3))
        work.go.release(2)
        assert await asyncio.gather(first, *others) == [0, 2, 4, 6]

    assert run(test).batches == [("first", [0]), ("a", [1, 2, 3])]


def test_the_longest_waiting_is_next_and_only_its_key_joins_it_up_to_the_limit() -> None:
    async def test(queue: Queue, work: Work) -> None:
        first = await busy(queue, work)
        others = await waiting(queue, ("a", 1), ("b", 2), ("a", 3), ("a", 4), ("a", 5), ("b", 6))
        work.go.release(4)
        assert await asyncio.gather(first, *others) == [0, 2, 4, 6, 8, 10, 12]

    assert run(test).batches == [("first", [0]), ("a", [1, 3, 4]), ("b", [2, 6]), ("a", [5])]


def test_an_error_reaches_those_of_its_batch_and_the_queue_goes_on() -> None:
    async def test(queue: Queue, work: Work) -> None:
        first = await busy(queue, work)
        others = await waiting(queue, ("broken", 1), ("broken", 2), ("a", 3))
        work.go.release(3)
        found = await asyncio.gather(first, *others, return_exceptions=True)
        assert [str(result) for result in found] == ["0", "broken", "broken", "6"]

    run(test)


def test_who_gives_up_while_waiting_is_not_worked_for() -> None:
    async def test(queue: Queue, work: Work) -> None:
        first = await busy(queue, work)
        gone, stays = await waiting(queue, ("a", 1), ("a", 2))
        gone.cancel()
        await asyncio.sleep(0)
        work.go.release(2)
        assert await asyncio.gather(first, stays) == [0, 4]

    assert run(test).batches == [("first", [0]), ("a", [2])]


def test_whoever_gives_up_while_being_worked_for_leaves_the_others_their_results() -> None:
    async def test(queue: Queue, work: Work) -> None:
        first = await busy(queue, work)
        first.cancel()
        [other] = await waiting(queue, ("a", 1))
        work.go.release(2)
        assert await other == 2

    run(test)


def test_without_a_free_place_the_next_is_told_when_to_come_back() -> None:
    async def test(queue: Queue, work: Work) -> None:
        with pytest.raises(KeyError), queue.place():
            raise KeyError  # a place is given back whatever happens
        with queue.place(), queue.place():
            with pytest.raises(OverloadError, match="try again in") as told, queue.place():
                pass
            assert 1 <= told.value.retry_after <= 60
        with queue.place():
            pass

    run(test, max_places=2)


def test_who_still_waits_when_the_queue_closes_is_cancelled() -> None:
    async def main() -> list[Any]:
        queue = Queue(work, max_batch=1, max_places=10)
        async with queue.running():
            first = await busy(queue, work)
            others = await waiting(queue, ("a", 1), ("b", 2))
            work.go.release(3)
        return await asyncio.gather(first, *others, return_exceptions=True)

    work = Work()
    assert all(isinstance(result, asyncio.CancelledError) for result in asyncio.run(main())[1:])
