"""The index of a shard: where its good samples lie, bound to the very tar that it was made from.

Reading by index, a broken sample never reaches the decoder, and a shard's samples can be taken in any order. The index
is an Arrow file beside its tar. Its header alone, which is all that is read at the start, tells whether it still fits.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa

from efficap.data.pool import in_processes, tracked
from efficap.data.shards.examine import SCHEMA, VERSION, Examined, IndexHeader, examine
from efficap.errors import InputError
from efficap.files import unfinished

SUFFIX = ".index.arrow"

_METADATA = b"efficap.index"


def index_file(tar: Path, index_dir: Path | None) -> Path:
    """Where the index of a tar lies: beside it, or in `index_dir` under a name of its own."""
    if index_dir is None:
        return tar.with_name(tar.name + SUFFIX)
    place = hashlib.blake2b(str(tar.parent.resolve()).encode(), digest_size=6).hexdigest()
    return index_dir / f"{tar.stem}.{place}{SUFFIX}"


def write_index(examined: Examined, tar: Path, index_dir: Path | None = None) -> None:
    """Write an index whole or not at all.

    Raises:
        InputError: the folder cannot be written to.
    """
    file = index_file(tar, index_dir)
    table = examined.samples.replace_schema_metadata({_METADATA: json.dumps(asdict(examined.header))})
    try:
        with (
            unfinished(file) as temporary,
            pa.OSFile(str(temporary), "wb") as sink,
            pa.ipc.new_file(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=max(1, table.num_rows))
    except OSError as error:
        raise InputError(
            f"the index {file} cannot be written ({error.strerror or error}); name a folder with data.index_dir=DIR"
        ) from error


def read_header(tar: Path, index_dir: Path | None = None) -> IndexHeader | None:
    """The header of a tar's index; None where there is none, or none that this version wrote."""
    try:
        with pa.memory_map(str(index_file(tar, index_dir))) as source:
            schema = pa.ipc.open_file(source).schema
        if not schema.equals(SCHEMA):
            return None
        metadata = schema.metadata or {}
        fields = json.loads(metadata[_METADATA])
        first_bad = fields.pop("first_bad")
        if first_bad is not None:
            key, reason, detail = first_bad
            first_bad = str(key), str(reason), str(detail)
        header = IndexHeader(**fields, first_bad=first_bad)
        if not all(isinstance(count, int) and count >= 0 for count in (header.good, *header.bad.values())):
            return None
    except (OSError, pa.ArrowException, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return header if header.version == VERSION else None


def read_samples(tar: Path, index_dir: Path | None = None) -> pa.Table:
    """The samples of an index, memory-mapped.

    Raises:
        InputError: it is damaged.
    """
    file = index_file(tar, index_dir)
    try:
        with pa.memory_map(str(file)) as source:
            samples = pa.ipc.open_file(source).read_all()
        samples.validate(full=True)  # else what is out of place is met later, or ends the process
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is damaged ({reason}); remove it, and it is made anew") from error
    return samples


def fits(header: IndexHeader, tar: Path, max_pixels: int) -> bool:
    """Whether a tar has the size and time of the one that was indexed, with the same limit."""
    stat = tar.stat()
    found = stat.st_size, stat.st_mtime_ns, max_pixels
    return (header.size, header.mtime_ns, header.max_pixels) == found


def ensure_indexes(
    tars: list[Path], *, index_dir: Path | None, max_pixels: int, workers: int
) -> dict[Path, IndexHeader]:
    """The header of each tar's index; those that lack one or have changed are indexed first, in parallel.

    A tar that was only copied or touched keeps its index: its size and digest are the same.

    Raises:
        InputError: an index cannot be written.
    """
    headers = {tar: read_header(tar, index_dir) for tar in tars}
    stale = [tar for tar, header in headers.items() if header is None or not fits(header, tar, max_pixels)]
    if stale:
        changed = sum(headers[tar] is not None for tar in stale)
        print(
            f"{len(stale):,} of {len(tars):,} shards have no valid index ({changed:,} have an old one): "
            "checking every sample once",
            file=sys.stderr,
        )
        jobs = [(tar, headers[tar], index_dir, max_pixels) for tar in stale]
        way_out = "the same command again goes on with the shards that are left"
        done = in_processes(_bring_up_to_date, jobs, workers=workers, way_out=way_out)
        headers |= dict(zip(stale, tracked(done, "Indexing shards", len(jobs)), strict=True))
    return {tar: header for tar, header in headers.items() if header is not None}


def _bring_up_to_date(job: tuple[Path, IndexHeader | None, Path | None, int]) -> IndexHeader:
    tar, header, index_dir, max_pixels = job
    try:
        return _indexed(tar, header, index_dir, max_pixels)
    except OSError as error:
        raise InputError(f"{tar} cannot be read: {error.strerror or error}") from error


def _indexed(tar: Path, header: IndexHeader | None, index_dir: Path | None, max_pixels: int) -> IndexHeader:
    if header is not None and (header.size, header.max_pixels) == (tar.stat().st_size, max_pixels):
        with tar.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        if digest == header.digest:
            header = replace(header, mtime_ns=tar.stat().st_mtime_ns)
            write_index(Examined(header, read_samples(tar, index_dir), []), tar, index_dir)
            return header
    examined = examine(tar, max_pixels=max_pixels)
    write_index(examined, tar, index_dir)
    return examined.header
