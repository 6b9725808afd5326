"""TensorFlow's checkpoint format (V2, "tensor bundle"), read without TensorFlow.

``PREFIX.index`` is a sorted string table as LevelDB writes it (its doc/table_format.md): names of variables to
protobuf messages of type, shape and place (tensorflow/core/protobuf/tensor_bundle.proto).
``PREFIX.data-00000-of-00001`` and its like hold the values, row after row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efficap.errors import InputError

MAX_INDEX_BYTES = 1 << 23  # the largest GPT-2's is 20 kB; what a made-up index can ask for stays small
MAX_NAME_BYTES = 1024
MAX_DIMENSIONS = 32
_MAGIC = 0xDB4775248B80FB57
_FOOTER, _TRAILER = 48, 5  # bytes; the trailer of a block is its compression and its checksum
_BFLOAT16 = 14
# tensorflow/core/framework/types.proto; strings, resources and complex numbers are no weights.
_FLOATS = {1: "<f4", 2: "<f8", 19: "<f2", _BFLOAT16: "<u2"}
_INTEGERS = {3: "<i4", 4: "<u1", 5: "<i2", 6: "<i1", 9: "<i8", 10: "?", 17: "<u2", 22: "<u4", 23: "<u8"}
_DTYPES = _FLOATS | _INTEGERS


def read_tf_checkpoint(prefix: Path) -> dict[str, NDArray[Any]]:
    """The numeric variables of a checkpoint under their names as stored.

    Args:
        prefix: the files' path without ``.index``, as in ``model.ckpt`` or ``model.ckpt-1000``.

    Returns:
        Arrays, memory-mapped (what is written to them stays in memory), in the types stored; bfloat16, which numpy
        lacks, widened to float32. An object-based checkpoint's names end in ``/.ATTRIBUTES/VARIABLE_VALUE``.

    Raises:
        InputError: a file is missing or damaged, or of a kind that is not read (compressed index, big-endian,
            partitioned variables).
    """
    index = prefix.with_name(f"{prefix.name}.index")
    if not index.is_file():
        raise InputError(f"{index} does not exist; a TensorFlow checkpoint has one beside its data files")
    try:
        return _read_bundle(prefix, _read_table(index))
    except (OSError, ValueError) as error:
        raise InputError(f"{index} cannot be read as a TensorFlow checkpoint: {error}") from error


def _read_bundle(prefix: Path, table: Iterator[tuple[bytes, bytes]]) -> dict[str, NDArray[Any]]:
    name, header = next(table, (b"", b""))
    numbers: dict[int, Any] = dict(_fields(header))
    shards = numbers.get(1, 0)
    if name or not isinstance(shards, int) or not shards:
        raise ValueError("it has no header")
    if numbers.get(2):
        raise ValueError("its values are big-endian; only little-endian ones are read")
    files: dict[int, _DataFile] = {}
    arrays = {}
    for name, message in table:
        entry: dict[int, Any] = dict(_fields(message))
        if 7 in entry:
            raise ValueError(f"{name.decode()!r} is partitioned, which is not read")
        if entry.get(1) not in _DTYPES:
            continue
        shard = entry.get(3, 0)
        if not isinstance(shard, int) or shard >= shards:
            raise ValueError(f"{name.decode()!r} is in data file {shard} of {shards}")
        if shard not in files:
            files[shard] = _DataFile(prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}"))
        arrays[name.decode()] = files[shard].array(name.decode(), entry)
    return arrays


class _DataFile:
    """The values of many variables, memory-mapped."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise ValueError(f"{file} does not exist")
        self.file, self.taken = file, 0
        self.values = np.memmap(file, np.uint8, "c") if file.stat().st_size else np.empty(0, np.uint8)

    def array(self, name: str, entry: dict[int, Any]) -> NDArray[Any]:
        """One variable. Sizes are checked, checksums not: a checksum of 6 GB takes Python an hour."""
        shape, dtype = _shape(entry.get(2, b"")), np.dtype(_DTYPES[entry[1]])
        offset, size = entry.get(4, 0), entry.get(5, 0)
        if not isinstance(offset, int) or not isinstance(size, int) or offset + size > len(self.values):
            raise ValueError(f"{name!r} lies beyond the {len(self.values)} bytes of {self.file}")
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{name!r} has shape {shape} of {dtype}, but {size} bytes")
        self.taken += size
        if self.taken > len(self.values):  # else one file could be widened any number of times
            raise ValueError(f"its variables overlap in {self.file}")
        array = self.values[offset : offset + size].view(dtype).reshape(shape)
        if entry[1] == _BFLOAT16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return np.require(array, requirements="A")  # for torch; in the file it may lie anywhere


def _shape(message: Any) -> tuple[int, ...]:
    sizes = [dict(_fields(value)).get(1, 0) for number, value in _fields(message) if number == 2]
    if len(sizes) > MAX_DIMENSIONS or not all(isinstance(size, int) and size < 1 << 48 for size in sizes):
        raise ValueError("a variable's shape is too large")
    return tuple(sizes)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: number and value, an int or bytes."""
    if not isinstance(message, bytes):
        raise ValueError("a number stands where a message should")
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        wire_type = key & 7
        if wire_type == 0:
            value, place = _varint(message, place)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, place = _varint(message, place)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a message has a field of type {wire_type}")
        yield key >> 3, _cut(message, place, size)
        place += size


# The sorted string table


def _read_table(file: Path) -> Iterator[tuple[bytes, bytes]]:
    if file.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"it has {file.stat().st_size} bytes, more than {MAX_INDEX_BYTES}")
    data = file.read_bytes()
    footer = data[-_FOOTER:]
    if int.from_bytes(footer[-8:], "little") != _MAGIC:
        raise ValueError("its last bytes are not those of an index; it may have been cut")
    place = 0
    for _ in range(2):  # past the handle of the metadata, of which there is none
        _, place = _varint(footer, place)
    end = 0
    for _, handle in _read_block(data, *_handle(footer[place:])):
        offset, size = _handle(handle)
        if offset < end:
            raise ValueError("its blocks overlap")
        end = offset + size
        yield from _read_block(data, offset, size)


def _handle(data: bytes) -> tuple[int, int]:
    offset, place = _varint(data, 0)
    return offset, _varint(data, place)[0]


def _read_block(data: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    block = _cut(data, offset, size + _TRAILER)
    content, compression, checksum = block[:size], block[size], int.from_bytes(block[size + 1 :], "little")
    if _masked_crc32c(block[: size + 1]) != checksum:
        raise ValueError("a checksum differs; it is damaged")
    if compression:
        raise ValueError("it is compressed; TensorFlow's own are not")
    restarts = 4 * int.from_bytes(content[-4:], "little") + 4  # bytes for binary search, not needed here
    name, place = b"", 0
    while place < size - restarts:
        shared, place = _varint(content, place)
        added, place = _varint(content, place)
        length, place = _varint(content, place)
        if shared > len(name) or shared + added > MAX_NAME_BYTES:
            raise ValueError("a name is too long or not whole")
        name = name[:shared] + _cut(content, place, added)
        yield name, _cut(content, place + added, length)
        place += added + length


def _cut(data: bytes, place: int, size: int) -> bytes:
    if place + size > len(data):
        raise ValueError("it ends too early")
    return data[place : place + size]


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits to the byte, lowest first, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = _cut(data, place, 1)[0]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number has more than ten bytes")


def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _, number in itertools.product(range(8), range(256)):
        table[number] = table[number] >> 1 ^ (0x82F63B78 if table[number] & 1 else 0)
    return table


_CRC32C = _crc32c_table()


def _masked_crc32c(data: bytes) -> int:
    """Castagnoli's checksum (RFC 3720, B.4), rotated and shifted as LevelDB stores it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
