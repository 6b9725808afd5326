"""A server for tests that breaks off, forgets, refuses and lies as servers do on bad days; and a full disk."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from efficap.data.prepare.download import Remote

BODY = bytes(range(256)) * 4000  # 1 MB


@dataclass
class Served:
    """A file on the server and how it is served."""

    body: bytes
    etag: str | None = '"1"'
    ranges: bool = True
    breaks: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    resets: bool = False  # whether they break with a reset or just end
    codes: list[int] = field(default_factory=list)  # answers to give before the file
    location: str | None = None
    requests: list[tuple[str, str | None]] = field(default_factory=list)  # method and Range


class Server:
    """Serves `files` by path, on a port of its own."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        files = self.files

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                served = files.get(self.path)
                if served is not None:
                    served.requests.append((self.command, self.headers["Range"]))
                code = 404 if served is None else served.codes.pop(0) if served.codes else 200
                if code != 200 or served is None:
                    self.send_response(code)
                    if served is not None and served.location:
                        self.send_header("Location", served.location)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                start = self._start(served)
                self.send_response(206 if start is not None else 200)
                if start is not None:
                    self.send_header(
                        "Content-Range", f"bytes {start}-{len(served.body) - 1}/{len(served.body)}"
                    )
                body = served.body[start or 0 :]
                self.send_header("Content-Length", str(len(body)))
                if served.etag:
                    self.send_header("ETag", served.etag)
                self.end_headers()
                if self.command == "HEAD":
                    return
                if served.breaks:
                    self.wfile.write(body[: served.breaks.pop(0)])
                    self.close_connection = True
                    if served.resets:
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        self.connection.close()
                else:
                    self.wfile.write(body)

            def _start(self, served: Served) -> int | None:
                wanted = self.headers["Range"]
                if not wanted or not served.ranges or self.headers["If-Range"] != served.etag:
                    return None
                return int(wanted.removeprefix("bytes=").removesuffix("-"))

            def finish(self) -> None:
                if not self.connection._closed:  # type: ignore[attr-defined]
                    super().finish()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def remote(self, name: str, body: bytes = BODY, **how: Any) -> Remote:
        """Serve a file, and say what is known about it."""
        self.files[f"/{name}"] = Served(body, **how)
        return Remote(f"{self.url}/{name}", name, size=len(body), sha256=hashlib.sha256(body).hexdigest())

    def gets(self, name: str) -> list[str | None]:
        """The ranges asked for."""
        return [wanted for method, wanted in self.files[f"/{name}"].requests if method == "GET"]


@contextmanager
def serving() -> Iterator[Server]:
    """A server on this machine, asked without a proxy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        running = Server()
        yield running
        running.server.shutdown()
        running.server.server_close()


def zipped(members: Mapping[str, bytes | str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return content.getvalue()


def full_disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
