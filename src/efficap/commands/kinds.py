"""Kinds of settings, and whether settings are of theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from efficap.errors import InputError


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of value.

    Attributes:
        says: what a value must be, for messages.
        holds: whether a value is of the kind.
        optional: whether the setting may be missing, as in the runs of earlier versions.
    """

    says: str
    holds: Callable[[Any], bool]
    optional: bool = False


_HUGE = 1e30  # above it, and of nan, nothing can be computed

Form = Mapping[str, "Kind | Form"]


def check_form(settings: Any, form: Form, where: str = "", *, exact: bool = False) -> None:
    """Check settings against their form.

    Args:
        where: what their names begin with, such as ``optimizer.``.
        exact: whether there may be none that it does not name; otherwise these are passed over.

    Raises:
        InputError: a setting is missing, of another kind, or one that nothing reads.
    """
    if not isinstance(settings, dict):
        first = f", such as {where}{next(iter(form))}=VALUE" if form else ""
        raise InputError(f"{where.removesuffix('.')}={_shown(settings)} must be a mapping of settings{first}")
    if exact and (unknown := sorted(map(str, settings.keys() - form.keys()))):
        raise InputError(f"{where}{unknown[0]} is no setting; there are {', '.join(form)}")
    for name, kind in form.items():
        if not isinstance(kind, Kind):
            if name not in settings:
                raise InputError(f"{where}{name} is missing; leave out what removes it")
            check_form(settings[name], kind, f"{where}{name}.", exact=exact)
        elif name not in settings:
            if not kind.optional:
                raise InputError(f"{where}{name} is missing; it must be {kind.says}")
        elif not kind.holds(settings[name]):
            raise InputError(f"{where}{name}={_shown(settings[name])} must be {kind.says}")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def whole(least: int | None = None, most: int | None = None) -> Kind:
    """A whole number within bounds; true and false are none."""

    def holds(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and (least is None or value >= least) and (most is None or value <= most)

    return Kind(f"a whole number{_range(least, most)}", holds)


def number(least: float | None = None, most: float | None = None) -> Kind:
    """A finite number within bounds."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and abs(value) < _HUGE
            and (least is None or value >= least)
            and (most is None or value <= most)
        )

    return Kind(f"a number{_range(least, most)}", holds)


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f" of at most {most}"
    return f" of at least {least}" if most is None else f" from {least} to {most}"


def or_null(kind: Kind) -> Kind:
    """The kind, or nothing."""
    return Kind(f"{kind.says}, or null", lambda value: value is None or kind.holds(value), kind.optional)


def either(one: Kind, other: Kind) -> Kind:
    """One of two kinds."""
    return Kind(f"{one.says}, or {other.says}", lambda value: one.holds(value) or other.holds(value))


def optional(kind: Kind) -> Kind:
    """The kind, of a setting that may be missing."""
    return Kind(kind.says, kind.holds, optional=True)


def list_of(kind: Kind, what: str, length: int | None = None) -> Kind:
    """A list of a kind; `what` says of what, for messages."""

    def holds(value: Any) -> bool:
        return isinstance(value, list) and length in (None, len(value)) and all(map(kind.holds, value))

    return Kind(f"a list of {what}", holds)


def mapping_of(kind: Kind, what: str) -> Kind:
    """A mapping of names that are the user's own to a kind; `what` says of what, for messages."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, dict)
            and all(isinstance(key, str) for key in value)
            and all(map(kind.holds, value.values()))
        )

    return Kind(f"a mapping of {what}", holds)


def _is_path(value: Any) -> bool:
    """Whether a file system could have it: what it cannot, it complains of at every question."""
    try:
        names = os.fsencode(value).split(b"/") if isinstance(value, str) else [b"\0"]
    except UnicodeEncodeError:
        return False
    return all(b"\0" not in name and len(name) <= 255 for name in names) and len(value) < 4096


TEXT = Kind("text; a number as text in inner quotes: \"'5'\"", lambda value: isinstance(value, str))
NAME = Kind("a name", lambda value: isinstance(value, str | int | float) and not isinstance(value, bool))
PATH = Kind(
    "a path, each of its names of at most 255 bytes; a number as a path in inner quotes: \"'5'\"", _is_path
)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SETTINGS = Kind("a mapping of settings", lambda value: isinstance(value, dict))
