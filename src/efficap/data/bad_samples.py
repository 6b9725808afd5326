"""What becomes of samples that cannot be used: left out, counted by reason, and too many of them stop the training."""

from __future__ import annotations

import logging
from collections import Counter

from efficap.errors import InputError

NAMED = 10  # how many an error names, and how many of a reason the log names

_log = logging.getLogger(__name__)


class BadSamples:
    """Counts bad samples; a sample counts once, however often it comes round.

    Args:
        on_bad_sample: ``skip`` leaves them out, ``raise`` stops at the first.
        max_bad_fraction: the share of all samples, 0 … 1, above which they are not left out but stop the training.

    Attributes:
        total: samples that the splits in use have, good and bad.
        counts: how many are bad, by reason.

    Raises:
        InputError: an unknown word, or no share.
    """

    def __init__(self, *, on_bad_sample: str, max_bad_fraction: float) -> None:
        if on_bad_sample not in ("skip", "raise"):
            raise InputError(f"data.on_bad_sample={on_bad_sample} must be skip or raise")
        if not 0 <= max_bad_fraction <= 1:
            raise InputError(f"data.max_bad_fraction={max_bad_fraction} must lie within 0 … 1")
        self.raises, self.max_bad_fraction = on_bad_sample == "raise", max_bad_fraction
        self.total = 0
        self.counts: Counter[str] = Counter()
        self._named: list[str] = []
        self._seen: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.counts)

    def add(self, name: str, reason: str, detail: str = "") -> None:
        """Count one sample.

        Args:
            name: where it lies: a file, or tar and key.
            reason: what to count it by.
            detail: more about it.

        Raises:
            InputError: ``raise`` was asked for.
        """
        if name in self._seen:
            return
        self._seen.add(name)
        self.counts[reason] += 1
        described = f"{name} ({reason}{': ' if detail else ''}{detail})"
        self._name(described)
        if self.counts[reason] <= NAMED:
            _log.warning("left out: %s", described)

    def add_counts(self, counts: dict[str, int], example: str) -> None:
        """Count samples that an index has left out already; `example` names one of them.

        Raises:
            InputError: ``raise`` was asked for.
        """
        self.counts.update(counts)
        if counts:
            self._name(example)

    def _name(self, described: str) -> None:
        if self.raises:
            raise InputError(
                f"{described}; mend or delete it, or leave such samples out: data.on_bad_sample=skip"
            )
        if len(self._named) < NAMED:
            self._named.append(described)

    def check(self) -> None:
        """Raises InputError where more than the allowed share of all samples is bad, with counts and names."""
        bad = self.counts.total()
        if bad > self.max_bad_fraction * self.total:
            more = f" and {bad - len(self._named):,} more" if bad > len(self._named) else ""
            raise InputError(
                f"{self} of {self.total:,} samples cannot be used, more than data.max_bad_fraction="
                f"{self.max_bad_fraction:g} allows: {'; '.join(self._named)}{more}. Mend or delete them, or raise it"
            )

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.counts.most_common())
        return f"{self.counts.total():,} ({reasons})"
