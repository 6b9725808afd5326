"""The demo's server within a test: the real application behind a real socket, its runs of random weights."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from conftest import compose

from efficap.demo.serve import build_service, listen
from efficap.demo.service import CaptionService


@dataclass(frozen=True)
class Served:
    """A server that answers.

    Attributes:
        port: of 127.0.0.1.
        service: what it asks.
        uploads: the folder of the page's uploads.
    """

    port: int
    service: CaptionService
    uploads: Path

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        *,
        chunked: bool = False,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {}, encode_chunked=chunked)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def caption(self, picture: bytes, **question: Any) -> tuple[int, Any]:
        """Status and JSON of ``POST /caption``."""
        status, _, body = self.ask("POST", f"/caption?{urlencode(question, doseq=True)}", picture)
        return status, json.loads(body)


@contextlib.contextmanager
def served(
    folder: Path, runs: list[Path], *overrides: str, examples: list[Path] | None = None
) -> Iterator[Served]:
    """Serve while the context is open.

    Args:
        folder: for uploads.
        overrides: of conf/demo.yaml.
    """
    import uvicorn

    from efficap.demo.server import build_app

    given = [f"run=[{','.join(map(str, runs))}]", "port=0", "accelerator=cpu", *overrides]
    cfg = compose("demo", *given)
    with pytest.MonkeyPatch.context() as patch, listen(cfg["host"], cfg["port"]) as listener:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        service = build_service(cfg)
        service.warm_up()
        app = build_app(
            service, examples=examples or [], max_bytes=cfg["max_bytes"], max_seconds=cfg["max_seconds"]
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Served(listener.getsockname()[1], service, folder)
        finally:
            server.should_exit = True
            thread.join(30)
