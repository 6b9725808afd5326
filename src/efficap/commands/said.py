"""What was said as a configuration was composed: beside ``init_from`` and ``resume`` all else is a run's own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig

OVERRIDES = "overrides"  # of a training's configuration that `compose` made: the words that made it
# In a program the first two have to be given, whatever is wanted; Hydra's own it keeps apart on a command line, too.
_NOT_SAID = ("name=", "output_dir=", "hydra.", "hydra/")


def with_said(cfg: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration with the overrides that made it, where it is one of a training, which may build on a run."""
    if "resume" not in cfg:
        return cfg
    return {**cfg, OVERRIDES: [word for word in overrides if not word.lstrip("+").startswith(_NOT_SAID)]}


def said_settings(cfg: Mapping[str, Any]) -> dict[str, str]:
    """Each setting or choice that was named for `cfg`, with the word that does; empty where there is none.

    What a program said lies in `cfg` (`with_said`); what the command line says, Hydra keeps.
    """
    if OVERRIDES in cfg:
        words = cfg[OVERRIDES]
    else:
        words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return {word.partition("=")[0].lstrip("+"): word for word in words}


def is_said(setting: str, said: Collection[str]) -> bool:
    """Whether a setting, or something that it is a part of, is among those that were named."""
    parts = setting.split(".")
    return any(".".join(parts[: count + 1]) in said for count in range(len(parts)))
