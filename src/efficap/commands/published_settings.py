"""What of a run's settings is published with its weights."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from efficap.commands.provenance import without_secrets

_NEEDED = ("name", "seed", "model", "data", "decoding")  # by others


def published_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A run's settings without what only its training needs, which may be secret, and without its machine's paths."""
    needed = {name: config[name] for name in _NEEDED if config.get(name) is not None}
    kept: dict[str, Any] = _without_paths(without_secrets(needed))
    model = {**kept["model"]}
    for part, name in (("encoder", "weights_file"), ("decoder", "name"), ("tokenizer", "name")):
        place = model[part].get(name)
        if isinstance(place, str) and (part == "encoder" or Path(place).expanduser().exists()):
            model[part] = {**model[part], name: None}
    return {**kept, "model": model}


def _without_paths(value: Any) -> Any:
    """The settings without those that say where something lay on the machine of the training.

    Each becomes None, whether it was one path or several, in a list or by split.
    """
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    if below and all(map(_is_absolute, below)):
        return None
    if isinstance(value, dict):
        return {key: _without_paths(setting) for key, setting in value.items()}
    return [_without_paths(setting) for setting in value] if isinstance(value, list) else value


def _is_absolute(value: Any) -> bool:
    return isinstance(value, str) and (
        PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    )
