"""What ``python -m efficap.demo`` is: the runs are loaded, tried once, and served until the process is stopped."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from efficap.commands.caption_folder import find_pictures
from efficap.commands.captioner import Captioner
from efficap.commands.kinds import check_form
from efficap.commands.run_dir import RunDirectory
from efficap.commands.schema import DEMO
from efficap.demo.service import FORMATS, CaptionService, Limits
from efficap.errors import InputError
from efficap.picture_files import SUFFIXES

EXAMPLES = 8  # shown at most


def serve(cfg: dict[str, Any]) -> None:
    """Serve as the plain values of conf/demo.yaml say; returns when the process is asked to stop.

    Raises:
        InputError: no such run, a run that cannot caption, an address that is taken, or Gradio is not installed.
    """
    check_form(cfg, DEMO)
    examples = _examples(cfg["examples"]) if cfg["examples"] else []
    with (
        tempfile.TemporaryDirectory(prefix="efficap-demo-") as uploads,
        listen(cfg["host"], cfg["port"]) as listener,
    ):
        # uvicorn hands a signal on when it has answered who was waiting; the uploads are to be removed after that.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        # Before Gradio is loaded, which reads them.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        uvicorn, build_app = _packages()
        service = build_service(cfg)
        service.warm_up()
        app = build_app(
            service, examples=examples, max_bytes=cfg["max_bytes"], max_seconds=cfg["max_seconds"]
        )
        host, port = listener.getsockname()[:2]
        print(
            f"http://{f'[{host}]' if ':' in host else host}:{port}   page; /docs   POST /caption", flush=True
        )
        config = uvicorn.Config(app, log_level="warning", timeout_keep_alive=15, timeout_graceful_shutdown=5)
        uvicorn.Server(config).run(sockets=[listener])


def _examples(setting: str) -> list[Path]:
    """Some of the pictures that the setting names, of those that a request may send, too."""
    suffixes = tuple(suffix for kind in FORMATS for suffix in SUFFIXES[kind])
    found = [file for file in find_pictures(setting, "examples") if file.suffix.lower() in suffixes]
    if not found:
        raise InputError(f"examples={setting} holds no picture that the demo opens ({', '.join(FORMATS)})")
    return found[:EXAMPLES]


def build_service(cfg: dict[str, Any]) -> CaptionService:
    """The runs that conf/demo.yaml's values name, loaded, with their limits.

    Raises:
        InputError: no such run, a GPU that is not there, or a limit that nobody could keep.
    """
    for name in ("max_batch", "max_requests", "max_bytes", "max_pixels", "max_seconds"):
        if not cfg[name] > 0:
            raise InputError(f"{name}={cfg[name]} must be above 0")
    paths = cfg["run"] if isinstance(cfg["run"], list) else [cfg["run"]]
    runs = [RunDirectory(path) for path in paths]
    if not runs:
        raise InputError("run=[] names no run; give a run directory, such as run=outputs/latest")
    place = {"accelerator": cfg["accelerator"], "precision": cfg["precision"]}
    captioners = [Captioner(run, **place, packed=True) for run in runs]
    names = dict(zip(_names(runs), captioners, strict=True))
    limits = Limits(pixels=cfg["max_pixels"], **cfg["limits"])
    return CaptionService(names, limits, max_batch=cfg["max_batch"], max_requests=cfg["max_requests"])


def _names(runs: list[RunDirectory]) -> list[str]:
    """The names that the runs were trained under; where several have the same, numbered so that no two are equal."""
    names = [str(run.config["name"]) for run in runs]
    counts, given = Counter(names), list[str]()
    for name in names:
        if counts[name] > 1:
            numbered = (f"{name}-{number}" for number in itertools.count(1))
            name = next(free for free in numbered if free not in counts and free not in given)
        given.append(name)
    return given


def _packages() -> tuple[Any, Any]:
    try:
        import uvicorn

        from efficap.demo.server import build_app
    except ImportError as error:
        raise InputError(
            f"the demo needs {error.name}, which is not installed: pip install 'efficap[demo]'"
        ) from error
    return uvicorn, build_app


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port that is taken is found before anything is loaded.

    Raises:
        InputError: it cannot be listened there.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"host={host} port={port} cannot be listened at ({error}); name another, or port=0 for any that is free"
        ) from error
    if host not in ("127.0.0.1", "localhost", "::1"):
        print(
            f"host={host}: whoever reaches this machine can use it; no password is asked for", file=sys.stderr
        )
    return listener
