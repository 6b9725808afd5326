"""Files of a pretrained model, from a directory or from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from efficap.errors import InputError


def pretrained_files(setting: str, name: str, files: Sequence[str], way_out: str) -> Path:
    """The directory that holds those of `files` that the model `name` has.

    Args:
        setting: the setting that named it, for messages: ``model.decoder.name``.
        name: a directory, or a name on the hub such as ``openai-community/gpt2``; without network, in its cache.
        files: names looked for; which of them must be there is the caller's matter.
        way_out: how to do without, for messages.

    Raises:
        InputError: no such directory or hub name, or no network and nothing in the cache.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{setting}={name} is no directory; {way_out}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # the client raises its own, httpx's and OSError, by version
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{setting}={name} is no directory and cannot be had from the hub ({lines[0]}); {way_out}"
        ) from error
