"""One HTTP transfer into a ``.part`` file: from the start, or from where an earlier one broke off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Event
from urllib.error import HTTPError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from efficap.errors import InputError

_BLOCK = 1 << 18  # bytes
_TIMEOUT = 60  # seconds without a byte
_PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers after which a later attempt may do better


class BrokenTransferError(Exception):
    """The connection, not the disk: worth another attempt."""


class DownloadError(InputError):
    """The server does not give the file, or not the one that is known."""


class StoppedError(Exception):
    """Another download failed, or the user interrupted."""


def continue_part(
    url: str, part: Path, size: int | None, report: Callable[[int, int | None], None], stop: Event
) -> None:
    """Download into `part`, going on from what it holds where that is certain to be the same file's beginning.

    Args:
        size: expected bytes of the whole; None if unknown.
        report: is given the bytes there are and the bytes there will be (None: unknown).
        stop: once set, ends the transfer with StoppedError.

    Raises:
        BrokenTransferError: the connection broke, or ended early.
        DownloadError: the server refuses, or has a file of another size.
    """
    source = _read_source(part)
    held = part.stat().st_size if source else 0
    if source and held == source["size"]:  # complete, but not yet renamed when the program ended
        return
    headers = {"Range": f"bytes={held}-", "If-Range": str(source["validator"])} if source and held else {}
    with _open(url, headers, part) as response:
        total = _total(response)
        resumed = response.status == 206
        if resumed and not (
            source and source == _source(response) and _first_byte(response) == held and total is not None
        ):
            _discard(part)
            raise BrokenTransferError("the server sent another part than was asked for")
        if size is not None and total is not None and total != size:
            _discard(part)
            raise DownloadError(
                f"{url} has {total:,} bytes now and {size:,} were expected: it is another file than the one known here"
            )
        if not resumed:
            held = 0
            _discard(part)
            if _source(response)["validator"]:
                source_of(part).write_text(json.dumps(_source(response)), encoding="utf-8")
        with part.open("ab") as file:
            while block := _read(response):
                file.write(block)
                held += len(block)
                report(held, total if total is not None else size)
                if stop.is_set():
                    raise StoppedError
    expected = total if total is not None else size
    if expected is not None and held < expected:
        raise BrokenTransferError(f"it ended after {held:,} of {expected:,} bytes")


def source_of(part: Path) -> Path:
    """The small file beside a ``.part`` that says of which version of the file it is the beginning."""
    return part.with_name(f"{part.name}.source")


def remote_size(url: str) -> int | None:
    """Bytes of a file on a server, or None where it does not say."""
    try:
        with _opener().open(Request(url, method="HEAD", headers=_HEADERS), timeout=_TIMEOUT) as response:
            return _total(response)
    except (OSError, HTTPException, ValueError):  # the download itself will tell what is wrong
        return None


# With compression on the way, neither lengths nor ranges would be the file's own.
_HEADERS = {"User-Agent": "efficap", "Accept-Encoding": "identity"}


def _opener() -> OpenerDirector:
    """As urllib's own but without the handlers of ftp, file and data, to which a server could redirect."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPHandler(),
        HTTPSHandler(),
        HTTPRedirectHandler(),
        HTTPDefaultErrorHandler(),
        HTTPErrorProcessor(),
        UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _open(url: str, headers: dict[str, str], part: Path) -> HTTPResponse:
    try:
        response: HTTPResponse = _opener().open(Request(url, headers=_HEADERS | headers), timeout=_TIMEOUT)
        return response
    except HTTPError as error:
        with error:
            reason = f"the server answers {error.code} {error.reason}"
        # there is nothing after what is held: then it is not the beginning of this file
        if error.code == 416:
            _discard(part)
            raise BrokenTransferError(reason) from error
        if error.code in _PASSING:
            raise BrokenTransferError(reason) from error
        own = part.with_name(part.name.removesuffix(".part"))
        raise DownloadError(
            f"{url}: {reason}; if you have the file from elsewhere, put it at {own}"
        ) from error
    except (OSError, HTTPException) as error:
        raise BrokenTransferError(f"no connection ({getattr(error, 'reason', error)})") from error


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read(_BLOCK)
    except (OSError, HTTPException) as error:
        raise BrokenTransferError(f"the connection broke ({error})") from error


def _total(response: HTTPResponse) -> int | None:
    """Bytes of the whole file, of which the response may be the end."""
    found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    length = found.group(1) if found else response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _first_byte(response: HTTPResponse) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found.group(1)) if found else None


def _source(response: HTTPResponse) -> dict[str, str | int | None]:
    """What tells this version of the file from others; only a strong ETag or a date may stand in If-Range."""
    tag = response.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else response.headers.get("Last-Modified")
    return {"validator": validator, "size": _total(response)}


def _read_source(part: Path) -> dict[str, str | int | None] | None:
    if not part.exists():
        return None
    try:
        source = json.loads(source_of(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return source if isinstance(source, dict) and source.get("validator") else None


def _discard(part: Path) -> None:
    source_of(part).unlink(missing_ok=True)  # first: without it, the part counts for nothing
    part.unlink(missing_ok=True)
