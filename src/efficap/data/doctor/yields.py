"""What a download gave: img2dataset's statistics beside each shard, against what the shard holds."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from efficap.data.doctor.findings import Finding


@dataclass(slots=True)
class Downloads:
    """The sum of the ``_stats.json`` beside the shards.

    https://github.com/rom1504/img2dataset: ``00000.tar`` gets its ``00000_stats.json`` when it is complete.

    Attributes:
        shards: those with statistics.
        urls: addresses tried.
        successes: samples that img2dataset says it wrote.
        found: samples in these shards, good and bad.
        failures: addresses that gave no sample, by reason.
        without: shards without statistics.
        unequal: shards that hold another number of samples than it says.
        broken: statistics that cannot be read.
    """

    shards: int = 0
    urls: int = 0
    successes: int = 0
    found: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    without: Finding = field(
        default_factory=lambda: Finding(
            "shards without statistics, as an interrupted download leaves them",
            advice="start img2dataset again: it completes them",
        )
    )
    unequal: Finding = field(
        default_factory=lambda: Finding(
            "shards with another number of samples than their statistics say",
            advice="delete tar and statistics, and start img2dataset again",
        )
    )
    broken: Finding = field(default_factory=lambda: Finding("statistics that cannot be read"))

    @property
    def findings(self) -> list[Finding]:
        return [self.unequal, self.without, self.broken]


def read_downloads(tar: Path, found: int, downloads: Downloads) -> None:
    """Add the statistics beside a tar in which `found` samples are."""
    file = tar.with_name(f"{tar.stem}_stats.json")
    try:
        stats = json.loads(file.read_bytes())
        count, successes = int(stats["count"]), int(stats["successes"])
        statuses = {str(status): int(number) for status, number in stats.get("status_dict", {}).items()}
    except FileNotFoundError:
        downloads.without.add(tar.name)
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        downloads.shards += 1
        downloads.broken.add(f"{file.name}: {error!r}")
        return
    downloads.shards += 1
    downloads.urls += count
    downloads.successes += successes
    downloads.found += found
    downloads.failures.update({status: n for status, n in statuses.items() if status != "success"})
    if found != successes:
        missing = f", {successes - found:,} missing" if found < successes else ""
        downloads.unequal.add(f"{tar.name}: {found:,} of {successes:,} samples{missing}")
