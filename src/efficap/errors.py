"""What a person can get wrong, as opposed to what the program gets wrong."""

from collections.abc import Iterable
from itertools import islice


class InputError(ValueError):
    """A setting, a file or a table that cannot be used.

    The message is one line that names the value, the limit and the way out. The entry points print it
    alone, without a traceback, and exit with status 1.
    """


def first_of(names: Iterable[object]) -> str:
    """The first three names that an error is about."""
    shown = list(map(str, islice(names, 4)))
    return ", ".join(shown[:3]) + (", …" if len(shown) > 3 else "")
