"""The command that trains on data, to be copied into a shell."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

# As conf/data/csv.yaml names them.
COLUMNS = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}


def training_command(data: str, **values: Path | str) -> str:
    """Training by settings of the group ``data``, as the shell takes them and Hydra after it."""
    settings = [shlex.quote(f"data.{name}={_hydra_value(str(value))}") for name, value in values.items()]
    return " ".join(["python train.py model=small", f"data={data}", *settings])


def _hydra_value(value: str) -> str:
    # Outside quotes, Hydra reads braces as a dictionary and stumbles over most other signs. Within them a backslash
    # stands for itself unless a quote or the end follows.
    if re.fullmatch(r"[\w./-]+", value, re.ASCII):
        return value
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"'{escaped}'"
