"""What an entry point meets that is no mistake of its program: told in one line that names the way out.

No torch here: an entry point has to set up its process before that is loaded.
"""

from __future__ import annotations

import errno
import re
import tempfile
from pathlib import Path

from efficap.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_DEAD_LOADER = (
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) "
    r"(?:is killed by signal: ([\w ]+)|exited unexpectedly(?: with exit code (\d+))?)"
)


FOR_RUNS = "hydra.run.dir=DIR takes another folder for the run"
FOR_SWEEPS = "hydra.sweep.dir=DIR takes another folder for the sweep"


def check_writable(out: Path, way_out: str = FOR_RUNS) -> None:
    """Raises InputError where nothing can be written to a folder, or where it cannot be made; leaves nothing."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".efficap-", dir=there):
            pass
    except OSError as error:
        raise InputError(cannot_be_written(out, error, way_out)) from error


def cannot_be_written(folder: Path | str | None, error: OSError, way_out: str = FOR_RUNS) -> str:
    """Why not, and the way out."""
    return f"{folder or 'a file'} cannot be written ({error.strerror}); {way_out}"


def of_disk(error: OSError) -> str | None:
    """What a disk that is full or may not be written, or a folder that may not be entered, has to say; else None."""
    if error.errno in _FULL:
        way_out = "write elsewhere" if error.errno == errno.EROFS else "make room, and start again"
        return cannot_be_written(error.filename, error, way_out)
    if error.errno in (errno.EACCES, errno.EPERM) and error.filename:
        return f"{error.filename} cannot be read or written ({error.strerror})"
    return None


def dead_loader(error: BaseException) -> str | None:
    """Which loader process died, and what may help; None if the error is another."""
    # What ended it, torch tells in the error before the one that it ends with.
    found = re.search(_DEAD_LOADER, str(error.__cause__)) or re.search(_DEAD_LOADER, str(error))
    if found is None:
        return None
    if found[3]:
        return f"the process {found[1]} that loads pictures ended with exit code {found[3]}; what it said stands above"
    how = f"was killed ({found[2]})" if found[2] else "died"
    if found[2] not in (None, "Killed", "Bus error"):
        return f"the process {found[1]} that loads pictures {how}"
    memory = "memory shared by processes (/dev/shm)" if found[2] == "Bus error" else "main memory"
    return (
        f"the process {found[1]} that loads pictures {how}, most likely for lack of {memory}: fewer num_workers "
        "(data.num_workers in training) need less"
    )
