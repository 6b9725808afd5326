"""The results of captioned shards, a Parquet file and its lines for each, and whose they are.

A shard is done while its path, size and time are those in its results. Its name alone would take another data set's
shard of that name for done, and for ever one that was not whole yet.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from efficap.errors import InputError
from efficap.files import replacing, unfinished

_METADATA = b"efficap.captions"  # in the Parquet file: the origin, as JSON
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("error", pa.string()),
        (
            "captions",
            pa.list_(
                pa.struct(
                    [
                        ("text", pa.string()),
                        ("score", pa.float32()),
                        ("ended", pa.bool_()),
                        ("tokens", pa.list_(pa.int32())),
                        ("token_log_probs", pa.list_(pa.float32())),
                    ]
                )
            ),
        ),
    ]
)


@dataclass(frozen=True, slots=True)
class Origin:
    """Which tar results are of, and in which state: by size in bytes and time, as an index tells it."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, tar: Path) -> Origin:
        """Of a tar as it is now; to be asked for before it is read."""
        stat = tar.stat()
        return cls(str(tar.parent.resolve() / tar.name), stat.st_size, stat.st_mtime_ns)


def is_done(folder: Path, tar: Path) -> bool | None:
    """Whether a folder has the results of a tar as it is now: False where it has changed since, None without results.

    Raises:
        InputError: they are another tar's of the same name, or do not say whose.
    """
    results = _results(folder, tar)
    if not results.is_file():
        return None
    found, origin = _read_origin(results), Origin.of(tar)
    if found is None:
        raise InputError(
            f"{results} does not say which tar's captions it has; name another folder with out=DIR"
        )
    if found.path != origin.path:
        raise InputError(
            f"{results} has the captions of {found.path}, not of {origin.path}; name another folder with out=DIR"
        )
    return found == origin


def write_results(folder: Path, tar: Path, origin: Origin, rows: list[dict[str, Any]]) -> None:
    """The lines first, the Parquet last: what it says of its origin means that the shard is done."""
    with replacing(folder / f"{tar.stem}.jsonl") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    schema = _SCHEMA.with_metadata({_METADATA: json.dumps(asdict(origin))})
    with unfinished(_results(folder, tar)) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary)


def _results(folder: Path, tar: Path) -> Path:
    return folder / f"{tar.stem}.parquet"


def _read_origin(results: Path) -> Origin | None:
    """What results say of their origin; None where it is nothing, as in those of earlier versions."""
    try:
        return Origin(**json.loads((pq.read_schema(results).metadata or {})[_METADATA]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
