"""What was said on the command line, as Hydra keeps it."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig


def said_settings() -> dict[str, str]:
    """Each setting or choice that the command line names, with the word that does; empty where there is none."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return {word.partition("=")[0].lstrip("+"): word for word in words}
