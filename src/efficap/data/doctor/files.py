"""Text files of the doctor."""

from __future__ import annotations

from pathlib import Path

from efficap.errors import InputError
from efficap.files import replacing


def write_text(path: Path, text: str, way_out: str) -> None:
    """Write UTF-8; until all of it is there, the file stays as it was.

    Raises:
        InputError: it cannot be written; ends with `way_out`.
    """
    try:
        with replacing(path) as file:
            file.write(text.encode(errors="replace"))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); {way_out}") from error
