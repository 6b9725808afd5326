"""The settings of a decoding by its name alone, in a program of one's own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from hydra.core.global_hydra import GlobalHydra

from efficap.commands.entry import CONF, NO_CONF, compose
from efficap.errors import InputError


@functools.cache
def decoding_settings(decoding: str) -> dict[str, Any]:
    """All settings of conf/decoding/`decoding`.yaml.

    Raises:
        InputError: there is no such file, or no conf/.
    """
    if not CONF.is_dir():
        raise InputError(NO_CONF)
    if not (CONF / "decoding" / f"{decoding}.yaml").is_file():
        known = sorted(file.stem for file in (CONF / "decoding").glob("*.yaml"))
        raise InputError(f"decoding={decoding} must be one of {', '.join(known)}")
    with _outside_of_hydra():
        settings: dict[str, Any] = compose("caption", f"decoding={decoding}", "run=", "images=")["decoding"]
    return settings


@contextlib.contextmanager
def _outside_of_hydra() -> Iterator[None]:
    """The program around may be one of Hydra's, which composes one configuration at a time."""
    around = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = around  # composing may have put another instance in its place
