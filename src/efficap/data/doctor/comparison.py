"""What shows only when all pictures are known: those that occur twice, those in two splits, those in bars."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field

import numpy as np

from efficap.data.doctor.duplicates import find_duplicates
from efficap.data.doctor.examination import Examination

EXHIBITS = 10  # groups of pictures that the page shows of each kind
SHOWN = 4  # pictures of a group that are named or shown


@dataclass(slots=True)
class Exhibit:
    """Pictures to be seen: numbers of good pictures, in groups that belong together."""

    title: str
    groups: list[list[int]] = field(default_factory=list)

    def add(self, group: list[int]) -> None:
        if len(self.groups) < EXHIBITS:
            self.groups.append(group[:SHOWN])


@dataclass(slots=True)
class Comparison:
    """The pictures to be seen, and all groups that are spread over several splits."""

    exhibits: list[Exhibit]
    crossing: list[list[int]]


def compare(seen: Examination) -> Comparison:
    """Compare all pictures, and add what is found to the examination's findings."""
    groups = find_duplicates(seen.looks)
    crossing = [group for group in groups if seen.kind == "table" and len(set(_parts(seen, group))) > 1]
    exhibits = [_crossing(seen, crossing), _duplicates(seen, groups), _padded(seen)]
    return Comparison([exhibit for exhibit in exhibits if exhibit.groups], crossing)


def _crossing(seen: Examination, groups: list[list[int]]) -> Exhibit:
    exhibit = Exhibit("In two splits")
    finding = seen.findings.of(
        "pictures in more than one split",
        "scores on them say little; --quarantine-duplicates keeps them out of training",
    )
    for group in groups:
        first_of_each = dict(reversed(list(zip(_parts(seen, group), group, strict=True))))
        chosen = sorted(first_of_each.values())
        finding.add(functools.partial(_in_parts, seen, chosen))
        exhibit.add(chosen)
    return exhibit


def _duplicates(seen: Examination, groups: list[list[int]]) -> Exhibit:
    exhibit = Exhibit("The same picture several times")
    finding = seen.findings.of(
        "pictures that repeat an earlier one" + (" of their split" if seen.kind == "table" else ""),
        "each is learned several times an epoch; delete what should not be",
    )
    for group in itertools.chain.from_iterable(_within_splits(seen, group) for group in groups):
        finding.add(functools.partial(_equal, seen, group), count=len(group) - 1)
        exhibit.add(group)
    return exhibit


def _in_parts(seen: Examination, group: list[int]) -> str:
    return " = ".join(f"{seen.name(number)} ({seen.parts[seen.part_of[number]].name})" for number in group)


def _equal(seen: Examination, group: list[int]) -> str:
    more = f" and {len(group) - SHOWN:,} more" if len(group) > SHOWN else ""
    return " = ".join(map(seen.name, group[:SHOWN])) + more


def _in_bars(seen: Examination, number: int, where: list[str]) -> str:
    return f"{seen.name(number)} ({' and '.join(where)})"


def _within_splits(seen: Examination, group: list[int]) -> list[list[int]]:
    if seen.kind == "shards":
        return [group]
    of_split: dict[int, list[int]] = {}
    for part, number in zip(_parts(seen, group), group, strict=True):
        of_split.setdefault(part, []).append(number)
    return [members for members in of_split.values() if len(members) > 1]


def _padded(seen: Examination) -> Exhibit:
    exhibit = Exhibit("In bars of one colour")
    finding = seen.findings.of(
        "pictures in bars of one colour", "cut the bars off; img2dataset's resize_mode=border puts them there"
    )
    shares = seen.looks["bars"]
    for number in np.flatnonzero(shares.any(axis=1)).tolist():
        height, width = shares[number].tolist()
        where = [f"{height} % of the height"] * bool(height) + [f"{width} % of the width"] * bool(width)
        finding.add(functools.partial(_in_bars, seen, number, where))
        exhibit.add([number])
    return exhibit


def _parts(seen: Examination, group: list[int]) -> list[int]:
    parts: list[int] = seen.part_of[group].tolist()
    return parts
