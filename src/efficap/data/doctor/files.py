"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from efficap.errors import InputError


def write_whole(file: Path, text: str, way_out: str) -> None:
    """Write UTF-8; until all of it is there, the file stays as it was.

    Raises:
        InputError: it cannot be written; ends with `way_out`.
    """
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # the same folder: a rename stays atomic
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8", errors="replace")
        os.replace(unfinished, file)
    except OSError as error:
        raise InputError(f"{file} cannot be written ({error.strerror or error}); {way_out}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
