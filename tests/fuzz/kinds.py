"""What is fuzzed: for each kind of input how examples are drawn, and what is done with one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st

from efficap.errors import InputError
from fuzz.sandbox import Sandbox

USED, REFUSED = "used", "refused in one line"


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        examples: draws one.
        use: writes it below the sandbox's root; what it returns is then called under watch, as the program does.
    """

    name: str
    examples: st.SearchStrategy[Any]
    use: Callable[[Any, Sandbox], Callable[[], object]]


def fuzz(
    kind: Kind,
    folder: Path,
    *,
    counts: Counter[str],
    examples: int,
    seed: int | None = None,
    until: float | None = None,
) -> None:
    """Try so many examples of a kind, and count how many were used and how many refused.

    Args:
        folder: a new one, for their files.
        seed: of the drawing; None: always the same examples.
        until: by time.monotonic(), after which no more are tried.

    Raises:
        Exception: what reached the user, with the smallest example that has it.
    """
    sandbox = Sandbox(folder)

    def check(example: Any) -> None:
        if until is not None and time.monotonic() > until:
            return
        sandbox.clear()
        call = kind.use(example, sandbox)
        outcome = USED
        with sandbox.watching():
            try:
                call()
            except InputError:
                outcome = REFUSED
        counts[outcome] += 1

    test = given(kind.examples)(check)
    if seed is not None:
        test = hypothesis.seed(seed)(test)
    settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )(test)()


# What several kinds draw

NAMES = st.sampled_from(
    [
        "a.png",
        "b.jpg",
        "sub/c.png",
        "./a.png",
        "sub/../a.png",
        "A.PNG",
        "link.png",
        "inner.png",
        "folder/canary.png",
        "../outside/canary.png",
        "sub/../../outside/canary.png",
        "@OUTSIDE@/canary.png",
        "a.png\0",
        "",
        " ",
        ".",
        "..",
        "/",
        "sub",
        "pipe.png",
        "missing.png",
        "x" * 300,
        "\u00e9\u200b.png",
        "-rf",
        "~",
        "C:\\a.png",
        "a.tar.gz.png",
    ]
)
CAPTIONS = st.sampled_from(
    [
        "a red picture",
        "",
        " ",
        "<script>alert(1)</script>",
        "</script><img src=x onerror=alert(1)>",
        "=1+1",
        '["one", "two"]',
        "['one', 'two']",
        "['one' 'two']",
        "['" + "[" * 2000 + "']",
        '["' + "]" * 2000 + '"]',
        "\u2028\x0b\x1b[31m\x07",
        "&lt;b&gt; &#0; &#xD800;",
        "a" * 5000,
        "<|endoftext|>",
        "${oc.env:A_SECRET_KEY}",
        "\u202e\U0001f600\u0301",
    ]
) | st.text(max_size=20)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**40, -1, 0, "../outside/canary.png", "@OUTSIDE@/canary.png"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=6,
)
# Changes of bytes: where, in parts of the whole, and to what.
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=6)
        | st.sampled_from([b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n", b"\r"]),
    ),
    max_size=3,
)


def damaged(data: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    """The bytes with changes of `DAMAGE`."""
    for how, share, piece in changes:
        place = int(share * len(data))
        after = place if how in ("insert", "repeat") else place + len(piece)
        if how == "repeat":
            piece = data[place : place + 64] * 4
        data = data[:place] + (b"" if how == "cut" else piece + data[after:])
    return data


def replaced(value: Any, path: list[int], new: Any) -> Any:
    """A JSON value with a part of it, which numbers lead to, replaced."""
    if not path or not isinstance(value, dict | list) or not value:
        return new
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[path[0] % len(keys)]
    changed = dict(value) if isinstance(value, dict) else list(value)
    changed[key] = replaced(value[key], path[1:], new)
    return changed


def with_places(value: Any, sandbox: Sandbox) -> Any:
    """The same with the folder of the canaries in place of ``@OUTSIDE@``."""
    if isinstance(value, str):
        return value.replace("@OUTSIDE@", str(sandbox.outside))
    if isinstance(value, list):
        return [with_places(below, sandbox) for below in value]
    if isinstance(value, dict):
        return {with_places(key, sandbox): with_places(below, sandbox) for key, below in value.items()}
    return value
