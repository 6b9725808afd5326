"""The whole of what is known of a data set, in plain values: counts, findings, histograms."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from efficap.data.doctor.examination import Examination, Part
from efficap.data.doctor.findings import Finding
from efficap.data.doctor.histograms import Histogram, histogram


@dataclass(slots=True)
class Diagnosis:
    """What the reports show.

    Attributes:
        source: the table, or the shards as they were named.
        kind: ``table`` or ``shards``.
        pictures: those that can be used.
        captions: of these and, in a table, of the bad ones.
        bad: pictures, or samples, that cannot be used.
        captions_per_picture: the number of pictures by the number of their captions.
        parts: splits or shards.
        downloads: sums of img2dataset's statistics; None where there are none.
        notes: what could not be looked into.
        files: what was written, apart from the report.
    """

    source: str
    kind: str
    pictures: int
    captions: int
    bad: int
    captions_per_picture: dict[str, int]
    parts: list[Part]
    findings: list[Finding]
    histograms: list[Histogram]
    downloads: dict[str, object] | None
    notes: list[str]
    files: list[str] = field(default_factory=list)


def conclude(source: str, seen: Examination) -> Diagnosis:
    """The sum of an examination whose pictures have been compared."""
    flat = int(seen.looks["flat"].sum())
    downloads = seen.downloads
    return Diagnosis(
        source=source,
        kind=seen.kind,
        pictures=sum(part.pictures for part in seen.parts),
        captions=seen.captions.captions,
        bad=sum(part.bad for part in seen.parts),
        captions_per_picture={str(n): count for n, count in sorted(seen.captions.per_picture.items())},
        parts=seen.parts,
        findings=seen.all_findings,
        histograms=_histograms(seen),
        downloads=None
        if downloads is None
        else {
            "shards": downloads.shards,
            "urls": downloads.urls,
            "successes": downloads.successes,
            "found": downloads.found,
            "failures": dict(downloads.failures.most_common()),
        },
        notes=[f"{flat:,} pictures without contrast were compared by their pixels alone"] if flat else [],
    )


def _histograms(seen: Examination) -> list[Histogram]:
    width, height = seen.looks["width"].astype(np.float64), seen.looks["height"].astype(np.float64)
    drawn = [
        histogram("short side, pixels", *_counted(np.minimum(width, height))),
        histogram("width / height", *_counted(np.round(width / height, 3))),
        histogram("words in a caption", *_of_counter(seen.captions.words)),
    ]
    return [entry for entry in drawn if entry is not None]


def _counted(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    found, counts = np.unique(values, return_counts=True)
    return found, counts.astype(np.int64)


def _of_counter(counter: Counter[int]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    pairs = sorted(counter.items())
    return np.array([value for value, _ in pairs], np.float64), np.array([n for _, n in pairs], np.int64)
