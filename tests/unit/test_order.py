"""Properties of the order of batches, for any numbers of samples, shards, ranks and batch sizes.

N samples, B of them in a batch of one rank, W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from toys import InTurn

from efficap.data.order import BatchOrder, EvaluationOrder, Key, Order, Shuffled, ShuffledShards, turn
from efficap.errors import InputError

SHARDS = st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any)
B, W = st.integers(1, 9), st.integers(1, 4)
SEED, EPOCH = st.integers(0, 3), st.integers(0, 5)
KINDS = st.sampled_from(["in turn", "shuffled", "shards"])

quickly = settings(deadline=None, max_examples=150)


def order_of(kind: str, counts: list[int], seed: int, group: int = 2) -> Order:
    """A fresh order of the samples of shards of these sizes."""
    if kind == "shards":
        return ShuffledShards(np.array(counts), seed, group)
    return Shuffled(sum(counts), seed) if kind == "shuffled" else InTurn(sum(counts))


def of_all_ranks(order: Order, batch_size: int, world: int, steps: int | None = None) -> list[BatchOrder]:
    return [
        BatchOrder(order, batch_size=batch_size, rank=rank, world=world, steps_per_epoch=steps)
        for rank in range(world)
    ]


def flat(batches: Iterable[list[Key]]) -> list[Key]:
    return [key for batch in batches for key in batch]


@quickly
@given(KINDS, SHARDS, B, W, SEED, EPOCH)
@example("shuffled", [12, 5], 8, 2, 0, 0)  # the last batch is one sample
def test_an_epoch_has_every_sample_once_but_the_few_that_ranks_cannot_share(
    kind: str, counts: list[int], batch_size: int, world: int, seed: int, epoch: int
) -> None:
    total = sum(counts)
    assume(total >= world)
    ranks = of_all_ranks(order_of(kind, counts, seed), batch_size, world)
    seen = Counter(flat(batch for rank in ranks for batch in rank.batches(epoch)))
    lost = {rank.lost for rank in ranks}
    assert len(lost) == 1
    assert 0 <= (left := lost.pop()) < world
    assert set(seen.values()) == {1}
    assert len(seen) == total - left
    assert {time for time, _ in seen} == {epoch}
    assert {sample for _, sample in seen} <= set(range(total))


@quickly
@given(SHARDS, B, W, EPOCH)
def test_every_rank_has_as_many_batches_and_only_the_last_two_are_not_full(
    counts: list[int], batch_size: int, world: int, epoch: int
) -> None:
    assume(sum(counts) >= world)
    ranks = of_all_ranks(order_of("shards", counts, 0), batch_size, world)
    sizes = [[len(batch) for batch in rank.batches(epoch)] for rank in ranks]  # (W, batches)
    assert {len(of_rank) for of_rank in sizes} == {len(rank) for rank in ranks} == {len(ranks[0])}
    for of_rank in sizes:
        assert all(size == batch_size for size in of_rank[:-2])
        assert all(0 < size <= batch_size for size in of_rank)
    for at_once in zip(*sizes, strict=True):
        assert max(at_once) - min(at_once) <= 1, "ranks wait for each other"
    if len(sizes[0]) > 1:
        last, before = sum(of_rank[-1] for of_rank in sizes), sum(of_rank[-2] for of_rank in sizes)
        assert abs(last - before) <= 1, "the two share what is left"


def test_ranks_that_cannot_share_the_last_samples_leave_them_out_and_count_them() -> None:
    assert BatchOrder(InTurn(9), batch_size=4, rank=0, world=2).lost == 0, "4, then 5 shared as 3 and 2"
    assert BatchOrder(InTurn(2), batch_size=1, rank=0, world=2).lost == 0
    left_over = BatchOrder(InTurn(5), batch_size=1, rank=0, world=4)
    assert (left_over.lost, list(left_over)) == (1, [[(0, 0)]])


@quickly
@given(SHARDS, B, W, st.integers(1, 9), st.sampled_from([None, 7]))
def test_another_number_of_ranks_goes_on_with_the_same_steps(
    counts: list[int], batch_size: int, world: int, others: int, steps: int | None
) -> None:
    assume(sum(counts) >= max(world, others) and batch_size * world >= 2 * others)
    order = order_of("shards", counts, 0)
    begun = of_all_ranks(order, batch_size, world, steps)
    gone_on = [
        BatchOrder(
            order, batch_size=batch_size, rank=rank, world=others, steps_per_epoch=steps, begun_by=world
        )
        for rank in range(others)
    ]

    def together(ranks: list[BatchOrder]) -> list[list[Key]]:
        return [flat(batches) for batches in zip(*(rank.batches(1) for rank in ranks), strict=True)]

    assert together(gone_on) == together(begun)
    assert all(len(batch) <= rank.largest for rank in gone_on for batch in rank.batches(1))


@quickly
@given(st.integers(0, 3), B)
def test_fewer_samples_than_ranks_are_refused(size: int, batch_size: int) -> None:
    with pytest.raises(InputError, match=f"{size} training pictures are fewer than the 4 processes"):
        BatchOrder(InTurn(size), batch_size=batch_size, rank=0, world=4)


@quickly
@given(KINDS, SHARDS, B, SEED, EPOCH, EPOCH)
def test_the_order_is_a_pure_function_of_seed_and_epoch(
    kind: str, counts: list[int], batch_size: int, seed: int, epoch: int, other: int
) -> None:
    used = BatchOrder(order_of(kind, counts, seed), batch_size=batch_size, rank=0, world=1)
    list(used.batches(other))  # what was asked for before changes nothing
    halfway = used.batches(other)
    next(halfway)
    fresh = BatchOrder(order_of(kind, counts, seed), batch_size=batch_size, rank=0, world=1)
    assert list(used.batches(epoch)) == list(fresh.batches(epoch))
    fresh.epoch = epoch
    assert list(fresh) == list(used.batches(epoch))


@pytest.mark.parametrize("kind", ["shuffled", "shards"])
def test_other_seeds_and_other_epochs_have_other_orders(kind: str) -> None:
    orders = {
        tuple(sample for _, sample in flat(batches.batches(epoch)))
        for seed in range(4)
        for batches in [BatchOrder(order_of(kind, [10, 20, 30], seed), batch_size=7, rank=0, world=1)]
        for epoch in range(4)
    }
    assert len(orders) == 16
    assert tuple(range(60)) not in orders


@quickly
@given(KINDS, SHARDS, B, W, EPOCH, st.one_of(st.none(), st.integers(1, 7)))
def test_an_epoch_can_be_entered_at_any_batch(
    kind: str, counts: list[int], batch_size: int, world: int, epoch: int, steps: int | None
) -> None:
    assume(sum(counts) >= world)
    for rank in of_all_ranks(order_of(kind, counts, 1), batch_size, world, steps):
        whole = list(rank.batches(epoch))
        assert len(whole) == len(rank)
        for first in range(len(whole) + 1):
            assert list(rank.batches(epoch, first=first)) == whole[first:]


@quickly
@given(KINDS, SHARDS, B, W, st.integers(1, 7))
def test_epochs_of_a_number_of_steps_go_on_where_the_last_one_stopped_and_round_again(
    kind: str, counts: list[int], batch_size: int, world: int, steps: int
) -> None:
    total = sum(counts)
    assume(total >= world)
    ranks = of_all_ranks(order_of(kind, counts, 1), batch_size, world, steps)
    together = []
    for epoch in range(4):
        for batches in zip(*(rank.batches(epoch) for rank in ranks), strict=True):
            assert {len(batch) for batch in batches} == {batch_size}
            together += flat(batches)
    assert len(together) == 4 * steps * batch_size * world
    endless = order_of(kind, counts, 1)
    times = -(-len(together) // total)
    expected = [(time, int(n)) for time in range(times) for n in endless.samples(time, 0, total)]
    assert together == expected[: len(together)]
    assert all(set(range(total)) == {n for t, n in expected if t == time} for time in range(times))


@quickly
@given(SHARDS, st.integers(1, 5), SEED, EPOCH)
def test_samples_are_mixed_within_groups_of_shards_alone(
    counts: list[int], group: int, seed: int, epoch: int
) -> None:
    order = ShuffledShards(np.array(counts), seed, group)
    samples = order.samples(epoch, 0, order.size)
    assert sorted(samples) == list(range(sum(counts)))
    shard_of = np.repeat(np.arange(len(counts)), counts)
    met = list(dict.fromkeys(int(shard) for shard in shard_of[samples]))  # as they come up first
    spans = [np.flatnonzero(shard_of[samples] == shard) for shard in met]
    together = max(  # shards that are under way at a place
        sum(span[0] <= place <= span[-1] for span in spans) for place in range(len(samples))
    )
    assert together <= group


def test_a_group_mixes_its_shards_and_the_shards_come_in_another_order_each_time() -> None:
    order = ShuffledShards(np.full(6, 50), 0, 3)
    shards = [order.samples(time, 0, 300) // 50 for time in range(3)]
    for of_time in shards:
        assert len(set(of_time[:150])) == 3, "half of the places are the first group's"
        assert (of_time[:150][1:] != of_time[:150][:-1]).mean() > 0.5, "mixed, not one after the other"
    assert len({frozenset(of_time[:150]) for of_time in shards}) > 1


@quickly
@given(SHARDS, st.integers(1, 4), st.data())
def test_any_piece_of_the_order_is_that_piece_and_only_a_group_is_held(
    counts: list[int], group: int, data: st.DataObject
) -> None:
    whole = ShuffledShards(np.array(counts), 3, group).samples(2, 0, sum(counts))
    order = ShuffledShards(np.array(counts), 3, group)
    for _ in range(5):
        start = data.draw(st.integers(0, sum(counts)))
        stop = data.draw(st.integers(start, sum(counts)))
        assert order.samples(2, start, stop).tolist() == whole[start:stop].tolist()
        assert len(order._order) <= sum(sorted(counts)[-group:])


def test_an_order_of_many_millions_holds_one_group() -> None:
    order = ShuffledShards(np.full(100_000, 10_000), 0, 2)
    assert order.size == 10**9
    place = 987_654_321
    piece = order.samples(1, place, place + 100)
    assert len(set(piece.tolist())) == 100
    assert len(order._order) == 20_000


@quickly
@given(st.integers(0, 60), B, W)
def test_evaluation_has_every_sample_once_in_turn(size: int, batch_size: int, world: int) -> None:
    assume(size >= world or world == 1)
    ranks = [EvaluationOrder(size, batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert [len(of_rank) for of_rank in batches] == [len(rank) for rank in ranks]
    assert flat(batch for of_rank in batches for batch in of_rank) == [(0, n) for n in range(size)]
    assert len(set(map(len, batches))) == 1, "ranks that wait for each other take the same number of batches"
    for order, of_rank in zip(ranks, batches, strict=True):
        assert all(1 <= len(batch) <= order.largest for batch in of_rank)
        assert all(len(batch) == batch_size for batch in of_rank[:-2])
        assert order.largest == batch_size or batch_size == 1


@quickly
@given(st.integers(1, 9), st.integers(1, 9), SEED, st.integers(0, 50))
def test_all_captions_are_used_without_repeats_before_any_comes_again(
    count: int, wanted: int, seed: int, sample: int
) -> None:
    rounds = np.lcm(count, min(wanted, count)) // min(wanted, count)
    used: Counter[int] = Counter()
    for time in range(int(rounds)):
        chosen = turn(count, wanted, seed=seed, time=time, sample=sample)
        assert chosen == turn(count, wanted, seed=seed, time=time, sample=sample)
        assert len(chosen) == len(set(chosen)) == min(wanted, count)
        used.update(chosen)
        if wanted <= count:
            assert max(used.values()) - min(used[n] for n in range(count)) <= 1
    assert used.keys() == set(range(count))
    assert len(set(used.values())) == 1


def test_pictures_do_not_all_begin_with_their_first_caption() -> None:
    first = [turn(5, 1, seed=0, time=0, sample=sample)[0] for sample in range(200)]
    assert set(first) == set(range(5))
