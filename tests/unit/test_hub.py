"""Files from a hub: a loopback server that answers as the hub's `resolve` and `tree` pages do."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from conftest import tiny_model
from safetensors.torch import save_file

from efficap.errors import InputError
from efficap.hub import Choice, pretrained_files
from efficap.models.build import build_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"safetensors",
    "pytorch_model.bin": b"pickle",
    "onnx/model.onnx": b"of no use",
}
PROGRAM = """
import sys
from efficap.errors import InputError
from efficap.hub import pretrained_files
def choose(names):
    return [file for file in sys.argv[2:] if file in names]
try:
    directory = pretrained_files("model.decoder.name", sys.argv[1], choose, sys.argv[2:], "a way out")
    print(*sorted(file.name for file in directory.iterdir()))
except InputError as error:
    print("error:", error)
"""


class Hub(BaseHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        model = "/api/models/them/gpt2"
        if path.startswith(f"{model}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            return self._answer(json.dumps(tree).encode())
        if path == model or path.startswith(f"{model}/revision/"):
            siblings = [{"rfilename": name} for name in FILES]
            return self._answer(json.dumps({"id": "them/gpt2", "sha": COMMIT, "siblings": siblings}).encode())
        name = path.removeprefix("/them/gpt2/resolve/").partition("/")[2]
        if path.startswith("/them/gpt2/resolve/") and name in FILES:
            return self._answer(FILES[name])
        return self._answer(b"", 404)

    def _answer(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., str]:
    """Run `pretrained_files` in a process of its own, for the client reads its environment when it is imported."""

    def ask(port: int, name: str, *files: str, **environment: str) -> str:
        variables = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        }
        command = [sys.executable, "-c", PROGRAM, name, *files]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables)
        return done.stdout.strip() or done.stderr

    return ask


def test_a_mirror_gives_the_chosen_files_alone_and_the_cache_gives_them_again(
    hub: ThreadingHTTPServer, ask: Callable[..., str]
) -> None:
    wanted = ("config.json", "model.safetensors")
    assert ask(hub.server_port, "them/gpt2", *wanted) == "config.json model.safetensors"
    assert not any("pytorch_model" in path or "onnx" in path for path in hub.asked)  # type: ignore[attr-defined]
    hub.asked.clear()  # type: ignore[attr-defined]
    assert ask(hub.server_port, "them/gpt2", *wanted, HF_HUB_OFFLINE="1") == "config.json model.safetensors"
    assert not hub.asked  # type: ignore[attr-defined]
    hub.shutdown()
    hub.server_close()
    assert ask(hub.server_port, "them/gpt2", *wanted) == "config.json model.safetensors"


def test_without_network_the_message_comes_at_once_and_names_the_files(ask: Callable[..., str]) -> None:
    start = time.monotonic()
    said = ask(9, "them/gpt2", "config.json", "model.safetensors")
    assert said.startswith(
        "error: model.decoder.name=them/gpt2 is no directory and cannot be had from the hub"
    )
    assert said.endswith(
        "; fetch config.json, model.safetensors of them/gpt2 where there is a network: a way out"
    )
    assert "\n" not in said
    assert time.monotonic() - start < 15  # the client's own retries take 23 seconds


def test_a_name_that_the_hub_does_not_know_is_called_so(
    hub: ThreadingHTTPServer, ask: Callable[..., str]
) -> None:
    assert "(it has no model of that name, or a private one)" in ask(
        hub.server_port, "them/gpt3", "config.json"
    )


def test_a_name_that_no_hub_could_have_is_refused() -> None:
    for name in ("them/gp t2", "...", "a/b/c", "gpt2--x"):
        with pytest.raises(InputError, match="is no directory"):
            pretrained_files("model.decoder.name", name, list, ("config.json",), "a way out")


def test_an_encoders_weights_are_timms_safetensors_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = timm.create_model("test_efficientnet.r160_in1k")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")

    def hub_files(subject: str, name: str, choose: Choice, usual: Sequence[str], way_out: str) -> Path:
        assert name == "timm/test_efficientnet.r160_in1k"
        assert choose(["README.md", "pytorch_model.bin", "model.safetensors"]) == list(usual)
        return tmp_path

    monkeypatch.setattr("efficap.models.encoder.hub_files", hub_files)
    model = tiny_model(encoder__pretrained=True, encoder__name="test_efficientnet.r160_in1k")
    encoder = build_model(model, 97).encoder
    encoder.load_pretrained(model["encoder"]["name"], None)
    for key, value in encoder.backbone.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])
