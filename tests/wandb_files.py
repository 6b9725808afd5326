"""Reads the file that an offline run of W&B leaves: LevelDB's log format, each record a message of W&B's protocol."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

_BLOCK, _FILE_HEADER, _HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class OfflineRun:
    """What lies in ``run-ID.wandb``.

    Attributes:
        run_id: of the file's name; one that was killed at once has nothing else.
        records: W&B's messages.
        contents: their bytes, one after the other.
    """

    def __init__(self, file: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.run_id = file.stem.removeprefix("run-")
        messages = _messages(file.read_bytes())
        self.contents = b"".join(messages)
        self.records = [Record.FromString(message) for message in messages]

    @property
    def run(self) -> Any:
        """The last record of the run itself: ``run_id``, ``display_name``, ``run_group``, ``tags``, ``resumed``."""
        return [record.run for record in self.records if record.WhichOneof("record_type") == "run"][-1]

    @property
    def config(self) -> dict[str, Any]:
        runs = [record.run.config for record in self.records if record.WhichOneof("record_type") == "run"]
        later = [record.config for record in self.records if record.WhichOneof("record_type") == "config"]
        return {item.key: json.loads(item.value_json) for part in runs + later for item in part.update}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The figures of each logged step."""
        return [
            {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            for record in self.records
            if record.WhichOneof("record_type") == "history"
        ]

    @property
    def exit_codes(self) -> list[int]:
        """Of the end: one where the run was finished, none where its process was killed."""
        kinds = [(record.WhichOneof("record_type"), record) for record in self.records]
        return [record.exit.exit_code for kind, record in kinds if kind == "exit"]


def finished_run(file: Path) -> OfflineRun:
    """A run that was ended: W&B's own process writes the last records a moment after that."""
    for _ in range(300):
        if (run := OfflineRun(file)).exit_codes:
            break
        time.sleep(0.1)
    return run


def _messages(data: bytes) -> list[bytes]:
    """The whole records of a log; what a kill cut off at its end is left out."""
    messages, parts, place = [], b"", _FILE_HEADER
    while place + _HEADER <= len(data):
        if _BLOCK - place % _BLOCK < _HEADER:  # the rest of a block is too short for a header
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        part = data[place + _HEADER : place + _HEADER + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(part) < length:
            break
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            messages.append(parts)
        place += _HEADER + length
    return messages
