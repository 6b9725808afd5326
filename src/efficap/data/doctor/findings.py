"""What was found: how often, and where first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

LISTED = 1000  # places kept of each kind, so that a report on millions stays small


@dataclass(slots=True)
class Finding:
    """One kind of trouble.

    Attributes:
        title: what it is, in the plural.
        count: how many there are.
        advice: what can be done about it.
        names: the first `LISTED` of them, printable.
    """

    title: str
    count: int = 0
    advice: str = ""
    names: list[str] = field(default_factory=list)

    def add(self, name: str | Callable[[], str], count: int = 1) -> None:
        """One more place, which counts `count` times; a name that takes long is asked for where it is kept."""
        self.count += count
        if len(self.names) < LISTED:
            self.names.append(printable(name() if callable(name) else name))

    def merge(self, other: Finding) -> None:
        """All of another finding of the same kind."""
        self.count += other.count
        self.names += other.names[: LISTED - len(self.names)]


def printable(text: str) -> str:
    """One line without control characters or lone surrogates, which file names may hold."""
    text = " ".join(text.split())
    return text if text.isprintable() else repr(text)[1:-1]


class Findings:
    """Findings by title, in the order in which they were first added."""

    def __init__(self) -> None:
        self._found: dict[str, Finding] = {}

    def of(self, title: str, advice: str = "") -> Finding:
        """The finding of that title, to be added to."""
        return self._found.setdefault(title, Finding(title, advice=advice))

    @property
    def all(self) -> list[Finding]:
        """Those that were found at least once."""
        return [finding for finding in self._found.values() if finding.count]
