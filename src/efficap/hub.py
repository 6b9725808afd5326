"""Files of a pretrained model, from a directory or from the Hugging Face hub.

The hub's own settings hold: HF_ENDPOINT names a mirror, HF_HOME the cache, HF_HUB_OFFLINE=1 asks nobody.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from efficap.errors import InputError

# From the names of a model's files to those to fetch; raises InputError where none serves.
Choice = Callable[[Sequence[str]], list[str]]
ANSWER_SECONDS = 10.0


def pretrained_files(setting: str, name: str, choose: Choice, usual: Sequence[str], way_out: str) -> Path:
    """The directory that holds the chosen files of the model `name`.

    Args:
        setting: the setting that named it, for messages: ``model.decoder.name``.
        name: a directory, or a name on the hub such as ``openai-community/gpt2``; without network, in its cache.
        choose: which files are needed.
        usual: the files that such a model has most often, for messages and to find it in the cache.
        way_out: how to do without, for messages.

    Raises:
        InputError: no such directory or hub name, none of its files serves, or no network and nothing in the cache.
    """
    directory = Path(name).expanduser()
    if directory.is_dir():
        choose(_names(directory))
        return directory
    if directory.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"{setting}={name} is no directory; {way_out}")
    return hub_files(f"{setting}={name} is no directory and", name, choose, usual, way_out)


def hub_files(subject: str, name: str, choose: Choice, usual: Sequence[str], way_out: str) -> Path:
    """`pretrained_files` of a name on the hub; `subject` begins the message where it cannot be had."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        # A question of its own, for it fails at once where the download's would be repeated for 23 seconds.
        files = HfApi().model_info(name, timeout=ANSWER_SECONDS).siblings or []
        chosen = choose([file.rfilename for file in files if "/" not in file.rfilename])
        return Path(snapshot_download(name, allow_patterns=chosen))
    except InputError:
        raise
    except Exception as error:  # the client raises its own, httpx's and OSError, by version
        cached = _cached(name, usual)
        if cached is not None:
            with contextlib.suppress(InputError):  # what is cached may be another part of it
                choose(_names(cached))
                return cached
        raise InputError(
            f"{subject} cannot be had from the hub ({_reason(error)}); "
            f"fetch {', '.join(usual)} of {name} where there is a network: {way_out}"
        ) from error


def _names(directory: Path) -> list[str]:
    return [file.name for file in directory.iterdir() if file.is_file()]


def _cached(name: str, usual: Sequence[str]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # a name that the hub could not have
        for file in usual:
            found = try_to_load_from_cache(name, file)
            if isinstance(found, str):
                return Path(found).parent
    return None


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError

    if isinstance(error, RepositoryNotFoundError):
        return "it has no model of that name, or a private one"
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
