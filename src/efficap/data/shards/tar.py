"""What lies in a webdataset shard: samples, found by the tar's headers alone."""

from __future__ import annotations

import errno
import hashlib
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from efficap.data.pictures import PictureError

BLOCK = 512  # bytes; a member's header is the block before its data

# As webdataset's writers name pictures. More of them would change what a tar holds, and so need every index made anew.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TEXT_SUFFIX, JSON_SUFFIX = ".txt", ".json"


# What tarfile raises for headers that say what cannot be, besides its own.
_DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, TypeError, RecursionError)


class SampleError(ValueError):
    """A sample that cannot be used; like `PictureError`, with a reason to count by and a detail."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


Broken = (PictureError, SampleError)


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a member's data lie in the tar, in bytes."""

    offset: int
    size: int


@dataclass(slots=True)
class TarSample:
    """The members of one key."""

    key: str
    image: Extent | None = None
    text: Extent | None = None
    json: Extent | None = None
    error: SampleError | None = None


@dataclass(slots=True)
class TarContents:
    """The samples of a tar in its order, and what is wrong with the tar itself."""

    samples: list[TarSample] = field(default_factory=list)
    problem: str | None = None


def read_contents(tar: Path) -> TarContents:
    """Read a tar's headers. Nothing is unpacked, links are not followed, and a broken tar gives what it still has.

    A key is a member's path without its last suffix. Members that are neither picture, ``.txt`` nor ``.json`` are
    passed over.

    Raises:
        OSError: the file cannot be opened.
    """
    contents = TarContents()
    size = tar.stat().st_size
    found: dict[str, TarSample] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            end = place = 0
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset <= place:  # round and round for ever
                    raise tarfile.ReadError("a member of negative size")
                place = archive.offset
                end = member.offset_data + _padded(member.size)
                if member.isfile():
                    _add(found, member, size)
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them otherwise
        if not found:
            contents.problem = "empty tar"
        elif not _has_end_mark(tar, end):
            contents.problem = "cut tar"
    except (*_DAMAGE, OSError) as error:
        # of a place before the file's beginning
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        contents.problem = "cut tar" if found else _why_no_tar(tar, size, error)
    contents.samples = list(found.values())
    return contents


def _add(found: dict[str, TarSample], member: tarfile.TarInfo, tar_size: int) -> None:
    path = PurePosixPath(member.name)
    suffix = path.suffix.lower()
    role = "image" if suffix in IMAGE_SUFFIXES else {TEXT_SUFFIX: "text", JSON_SUFFIX: "json"}.get(suffix)
    if role is None:
        return
    sample = found.setdefault(str(path.with_suffix("")), TarSample(str(path.with_suffix(""))))
    if not is_unicode(member.name):
        sample.error = SampleError("unsafe name", ascii(member.name))
    elif path.is_absolute() or ".." in path.parts:
        sample.error = SampleError("unsafe name", member.name)
    elif getattr(sample, role) is not None:
        sample.error = SampleError("duplicate key", f"a second {suffix}")
    elif member.offset_data + member.size > tar_size:
        sample.error = SampleError("truncated", "the tar ends within it")
    else:
        setattr(sample, role, Extent(member.offset_data, member.size))


def is_unicode(name: str) -> bool:
    """Whether it can be written as UTF-8: a tar's names may hold any bytes, and a json's strings half characters."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def fingerprint(header: bytes) -> int:
    """64 bits that tell a member's header block from others: it holds name, size and time, and their checksum."""
    return int.from_bytes(hashlib.blake2b(header, digest_size=8).digest(), signed=True)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _has_end_mark(tar: Path, end: int) -> bool:
    """Whether a block of zeros follows: without it, a tar was cut between two members, and nobody would know."""
    with tar.open("rb") as file:
        file.seek(end)
        return file.read(BLOCK) == bytes(BLOCK)


def _why_no_tar(tar: Path, size: int, error: Exception) -> str:
    if size == 0:
        return "empty tar"
    with tar.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return "compressed tar" if compressed else f"no tar ({error})"
