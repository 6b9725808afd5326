"""YAML files that may come from anywhere: plain values of a bounded size, or one line that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from efficap.errors import InputError

MAX_BYTES = 1 << 20  # a run's configuration has some 4 kB
MAX_VALUES = 100_000  # aliases counted where they stand: a few lines of them can mean billions
_SCALARS = (str, int, float, bool, type(None))


def read_yaml(file: Path) -> Any:
    """The plain values of a YAML file: mappings, lists, texts, numbers, true and false, null.

    Nothing is built and nothing is looked up: ``${oc.env:HOME}`` is a text like any other.

    Raises:
        InputError: it cannot be read, is no YAML, is too large or too deep, or holds other values.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise InputError(f"{file} has more than {MAX_BYTES:,} bytes, which no configuration has")
        value = yaml.safe_load(data)
        _count(value, above=set(), counted={})
    except RecursionError:
        raise InputError(f"{file} is nested too deeply for a configuration") from None
    except (OSError, ValueError, OverflowError, TypeError, yaml.YAMLError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file} is no YAML of plain values: {' '.join(str(error).split())}") from error
    return value


def _count(value: Any, above: set[int], counted: dict[int, int]) -> int:
    """The number of values, those of an alias each time; raises ValueError where they are too many or no plain ones."""
    if isinstance(value, _SCALARS):
        return 1
    if not isinstance(value, dict | list):
        raise ValueError(f"{value!r:.60} is a {type(value).__name__}; put it in quotes")
    if id(value) in above:
        raise ValueError("an alias holds itself")
    if id(value) not in counted:
        above.add(id(value))
        total = 1
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, _SCALARS) or key is None:
                    raise ValueError(f"the key {key!r:.60} is a {type(key).__name__}; put it in quotes")
        for below in value.values() if isinstance(value, dict) else value:
            total += _count(below, above, counted)
        if total > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        above.remove(id(value))
        counted[id(value)] = total
    return counted[id(value)]
