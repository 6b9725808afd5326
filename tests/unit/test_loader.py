"""Batches of which nothing is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from toys import InTurn

from efficap.data.bad_samples import BadSamples
from efficap.data.loader import CheckedLoader
from efficap.data.order import BatchOrder
from efficap.errors import InputError


def loader(batches: list[Any]) -> CheckedLoader:
    order = BatchOrder(InTurn(4 * len(batches)), batch_size=4, rank=0, world=1)
    read = [(batch, []) for batch in batches]
    bad = BadSamples(on_bad_sample="skip", max_bad_fraction=0.5)
    return CheckedLoader(read, order, bad, world=1, place=lambda: (0, 0))


def places(loader: CheckedLoader) -> Iterator[tuple[Any, int]]:
    for batch in loader:
        yield batch, loader.place[1]


def test_an_epoch_keeps_its_length_where_nothing_is_left_of_its_first_batches() -> None:
    found = list(places(loader([None, None, "c", "d", None])))
    assert [batch for batch, _ in found] == ["c", "c", "c", "d", "d"]
    assert [place for _, place in found[2:]] == [3, 4, 5], (
        "as many batches were trained on as are passed over"
    )


def test_an_epoch_of_which_nothing_is_left_is_an_error() -> None:
    with pytest.raises(InputError, match="nothing of 2 batches can be used"):
        list(loader([None, None]))
