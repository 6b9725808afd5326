"""What a pass over all pictures gives, whether they lie in files or in shards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from efficap.data.doctor.captions import CaptionTally
from efficap.data.doctor.findings import Finding, Findings
from efficap.data.doctor.fingerprint import LOOK, Looks
from efficap.data.doctor.yields import Downloads
from efficap.data.pictures import Picture


@dataclass(slots=True)
class Part:
    """A split, or a shard: its good pictures, its captions, and the pictures or samples that cannot be used."""

    name: str
    pictures: int = 0
    captions: int = 0
    bad: int = 0


class Place(Protocol):
    """Where the pictures lie; one is asked for by its part and its row in it."""

    def name(self, part: int, row: int) -> str:
        """What a person finds it by."""

    def caption(self, part: int, row: int) -> str:
        """The first of its captions."""

    def picture(self, part: int, row: int) -> Picture:
        """Raises PictureError where it is gone."""


@dataclass(slots=True)
class Examination:
    """All that was seen.

    Attributes:
        kind: ``table`` or ``shards``.
        place: gives names and thumbnails of the few pictures that are shown.
        parts: the splits, or the shards.
        captions: of good pictures.
        findings: of files and captions; those that come from comparing pictures are added later.
        looks, part_of, row_of: of each good picture, and where it lies.
        unreadable: image id and reason of each picture of a table that cannot be read.
        downloads: what img2dataset says of the shards; None where it says nothing.
    """

    kind: str
    place: Place
    parts: list[Part]
    captions: CaptionTally
    findings: Findings
    looks: Looks = field(default_factory=lambda: np.zeros(0, LOOK))
    part_of: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    row_of: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    downloads: Downloads | None = None

    def gather(self, looks: list[Looks], parts: list[int], rows: list[NDArray[np.int32]]) -> None:
        """Join what the workers sent: the looks of some pictures of one part, and their rows in it."""
        if looks:
            self.looks = np.concatenate(looks)
            self.part_of = np.repeat(np.array(parts, np.int32), [len(chunk) for chunk in looks])
            self.row_of = np.concatenate(rows)

    def name(self, number: int) -> str:
        """The name of a good picture."""
        return self.place.name(int(self.part_of[number]), int(self.row_of[number]))

    def caption(self, number: int) -> str:
        return self.place.caption(int(self.part_of[number]), int(self.row_of[number]))

    def picture(self, number: int) -> Picture:
        return self.place.picture(int(self.part_of[number]), int(self.row_of[number]))

    @property
    def all_findings(self) -> list[Finding]:
        return [*self.findings.all, *([self.captions.long] if self.captions.long.count else [])]
