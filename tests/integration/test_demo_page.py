"""The demo's page: what its server gives away of the machine's files, and its use in a browser."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from conftest import write_colour_table, write_random_run
from demo_server import Served, served

# Not imported for it: gradio takes seconds, of each process that collects tests.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None,
    reason="the demo's packages are not installed: pip install 'efficap[demo]'",
)
SECRET = "the butler did it"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_colour_table(tmp_path_factory.mktemp("demo_page") / "colours")
    (folder / "secret.txt").write_text(SECRET)
    shutil.copy(folder / "secret.txt", folder / "images" / "secret.txt")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[Path]:
    runs = [write_random_run(folder.parent / "m1"), write_random_run(folder.parent / "m2", "name=other")]
    for run in runs:
        (run / "secret.txt").write_text(SECRET)
    return runs


@pytest.fixture(scope="module")
def server(folder: Path, runs: list[Path]) -> Iterator[Served]:
    examples = sorted((folder / "images").glob("test*.jpg"))
    with served(folder.parent / "uploads", runs, "max_bytes=100000", examples=examples) as server:
        yield server


def test_the_page_and_its_example_are_served(server: Served) -> None:
    status, headers, page = server.ask("GET", "/")
    assert status == 200
    assert b"efficap" in page
    assert "default-src 'self'" in headers["content-security-policy"]
    config = json.loads(server.ask("GET", "/config")[2])
    [example, *_] = re.findall(r"/\S+?test_0\.jpg", json.dumps(config))
    assert server.ask("GET", f"/gradio_api/file={example}")[0] == 200


@pytest.mark.parametrize(
    "way",
    [
        "/gradio_api/file={file}",
        "/gradio_api/file=/{file}",
        "/gradio_api/file={quoted}",
        "/gradio_api/file=file://{file}",
        "/gradio_api/file={uploads}/..{below}",
        "/gradio_api/file={uploads}/%2e%2e{below}",
        "/gradio_api/file={uploads}/..%2f..{file}",
        "/gradio_api/file=../../../../../../../../../../..{file}",
        "/gradio_api/file={file}%00.jpg",
        "/file={file}",
        "/file/{file}",
        "{file}",
        "/../../../../../../../..{file}",
        "/static/../../../../../../../../../..{file}",
        "/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{file}",
        "/static/{quoted}",
        "/static//{file}",
        "/assets/../../../../../../../../../../../..{file}",
        "/assets/{quoted}",
        "/svelte/../../../../../../../../../../../..{file}",
        "/static-offline-docs/../../../../../../../../../../..{file}",
        "/static-offline-docs/{quoted}",
        "/custom_component/1/client/component/..%2f..{file}",
        "/gradio_api/proxy=file://{file}",
        "/gradio_api/stream/x/1/{quoted}",
        "/gradio_api/deep_link?session_hash={file}",
    ],
)
@pytest.mark.parametrize("where", ["beside the pictures", "in the run", "beside the example"])
def test_no_file_of_the_machine_is_read(
    way: str, where: str, server: Served, folder: Path, runs: list[Path]
) -> None:
    file = {
        "beside the pictures": folder / "secret.txt",
        "in the run": runs[0] / "secret.txt",
        "beside the example": folder / "images" / "secret.txt",
    }[where]
    below = str(file).removeprefix(str(server.uploads.parent))
    path = way.format(file=file, quoted=quote(str(file), safe=""), uploads=server.uploads, below=below)
    status, _, body = server.ask("GET", path)
    assert SECRET.encode() not in body
    assert status >= 400


def test_no_route_of_gradios_that_the_page_does_not_use_answers(server: Served) -> None:
    for method, path in (
        ("GET", "/monitoring"),
        ("GET", "/monitoring/summary"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/"),
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/runs"),
        ("POST", "/gradio_api/run/predict"),
        ("GET", "/redoc"),
    ):
        assert server.ask(method, path)[0] == 404, path


def upload(server: Served, data: bytes, name: str) -> tuple[int, bytes]:
    """Status and body of the answer to an upload, as the page sends it."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    body = head.encode() + data + b"\r\n--x--\r\n"
    status, _, answer = server.ask("POST", "/gradio_api/upload", body, headers)
    return status, answer


def test_an_upload_is_bounded_and_lands_among_the_others(server: Served) -> None:
    assert upload(server, bytes(100_001), "a.jpg")[0] == 413
    assert upload(server, bytes(1000), "../../a.jpg")[0] == 200
    found = list(server.uploads.parent.rglob("a.jpg"))
    assert found
    assert all(file.is_relative_to(server.uploads) for file in found)


@contextlib.contextmanager
def listening() -> Iterator[tuple[str, list[Any]]]:
    """The address of a server that keeps who came to it."""
    visits: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                visits.append(listener.accept()[1])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/picture.jpg", visits


_META = {"_type": "gradio.FileData"}


class Event:
    """The page's event that captions, asked for with whatever a client may call its upload."""

    def __init__(self, server: Served) -> None:
        self.server = server
        config = json.loads(server.ask("GET", "/config")[2])
        values = {component["id"]: component["props"].get("value") for component in config["components"]}
        event = next(event for event in config["dependencies"] if len(event["inputs"]) > 5)
        self.number, self.others = event["id"], [values[number] for number in event["inputs"][1:]]

    def ask(self, upload: Any, meta: dict[str, Any] | None = _META) -> str:
        """What the page's stream says, until it ends."""
        if meta is not None:
            upload = {**upload, "meta": meta}
        question = {
            "data": [upload, *self.others],
            "fn_index": self.number,
            "session_hash": os.urandom(4).hex(),
        }
        headers = {"Content-Type": "application/json"}
        self.server.ask("POST", "/gradio_api/queue/join", json.dumps(question), headers)
        address = f"/gradio_api/queue/data?session_hash={question['session_hash']}"
        return self.server.ask("GET", address)[2].decode()


def test_the_page_reads_no_file_and_no_address_that_it_was_not_sent(server: Served, folder: Path) -> None:
    event, picture, secret = Event(server), folder / "images" / "test_0.jpg", folder / "secret.txt"
    [path] = json.loads(upload(server, picture.read_bytes(), "a.jpg")[1])
    answer = event.ask({"path": path})
    assert '"success":true' in answer
    assert "<img" in answer
    with listening() as (address, visits):
        for given in (
            {"path": str(secret)},
            {"path": str(picture)},
            {"path": str(picture), "is_stream": True},
            {"path": f"{server.uploads}/../colours/images/test_0.jpg"},
            {"path": address},
            {"path": address, "is_stream": True},
            {"path": None, "url": address},
            {"path": "x", "url": address},
        ):
            answer = event.ask(given)
            assert '"success":false' in answer, given
            assert "<img" not in answer
        assert "a picture must be uploaded" in event.ask({"path": address})
        link = server.uploads / "link.jpg"
        link.symlink_to(picture)
        for path in (secret, picture, link, "/dev/zero", "\0", 7, None):
            for meta in (None, {"_type": "something.Else"}):  # of which Gradio looks at nothing
                answer = event.ask({"path": str(path) if isinstance(path, Path) else path}, meta)
                assert '"success":false' in answer, (path, meta)
                assert "<img" not in answer
                assert SECRET[:8] not in answer
        for odd in (str(secret), [str(secret)], 7):
            assert "<img" not in event.ask(odd, None)
        assert visits == []
    kept = [file.read_bytes() for file in server.uploads.rglob("*") if file.is_file()]
    assert not any(SECRET.encode() in data for data in kept)


def test_of_a_picture_that_was_deleted_since_the_page_says_so(server: Served, folder: Path) -> None:
    [path] = json.loads(upload(server, (folder / "images" / "test_1.jpg").read_bytes(), "b.jpg")[1])
    Path(path).unlink()
    assert "drop it again" in Event(server).ask({"path": path})


@pytest.fixture(scope="module")
def address(folder: Path, runs: list[Path]) -> Iterator[str]:
    """Of the command in a process of its own, as its first line says it."""
    command = [
        sys.executable,
        "-m",
        "efficap.demo",
        f"run=[{runs[0]},{runs[1]}]",
        "port=0",
        "accelerator=cpu",
    ]
    place = folder.parent / "temporary"
    place.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("http://127.0.0.1:"), line
            yield line.split()[0]
        finally:
            process.terminate()
            assert process.wait(30) == 143
    assert not list(place.glob("efficap-demo-*"))  # the uploads


@pytest.fixture
def browser_page(tmp_path: Path) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser: none of {', '.join(BROWSERS)}; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"),
            executable_path=browser,
            args=FLAGS,
            viewport={"width": 1200, "height": 800},
        )
        context.set_default_timeout(60_000)
        yield context.new_page()
        context.close()


DROP = """async ([data, name]) => {
    const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
    const files = new DataTransfer();
    files.items.add(new File([bytes], name, {type: "image/jpeg"}));
    const target = document.querySelector("#picture button, #picture [role=button]");
    for (const kind of ["dragenter", "dragover", "drop"])
        target.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


@pytest.mark.slow
def test_in_a_browser_a_dropped_picture_is_captioned_looked_into_and_captioned_anew(
    address: str, browser_page: Any, folder: Path
) -> None:
    import base64

    from playwright import sync_api as playwright

    page, hosts = browser_page, set()
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "//" in request.url else None)
    page.goto(address)
    page.wait_for_selector("#picture button")
    data = base64.b64encode((folder / "images" / "test_3.jpg").read_bytes()).decode()
    page.evaluate(DROP, [data, "test_3.jpg"])
    for run in ("#run-0", "#run-1"):
        page.wait_for_selector(f"{run} .word")
        assert page.locator(f"{run} p").count() == 1

    word = page.locator("#run-0 .word").first
    shown = word.locator("img")
    assert shown.evaluate("image => getComputedStyle(image).opacity") == "0"
    word.hover()
    page.wait_for_function("getComputedStyle(document.querySelector('#run-0 .word img')).opacity == 1")
    assert re.fullmatch(r"[\d.]+%", word.get_attribute("title"))

    page.click("#decoding input")
    page.get_by_role("option", name="beam").click()
    beams = page.locator("#num_beams input[type=number]")
    beams.wait_for()
    assert beams.input_value() == "5"
    page.fill("#num_return_sequences input[type=number]", "4")
    page.wait_for_function("document.querySelectorAll('#run-1 p').length == 4")
    for few in ("2", "3", "2", "3"):  # what is typed as an answer arrives, Gradio may not hear
        page.fill("#num_beams input[type=number]", few)
        told = page.get_by_text(f"num_return_sequences=4 must be from 1 to decoding.num_beams={few}")
        with contextlib.suppress(playwright.TimeoutError):
            told.wait_for(timeout=15_000)
            break
    else:
        pytest.fail("more captions than beams are not refused")
    page.fill("#num_return_sequences input[type=number]", "2")
    page.wait_for_function("document.querySelectorAll('#run-1 p').length == 2")

    page.goto(f"{address}/docs")
    page.get_by_text("Caption a picture").wait_for()
    assert hosts == {address.removeprefix("http://")}


@pytest.mark.slow
def test_in_a_browser_what_is_no_picture_is_said_to_be_none(
    address: str, browser_page: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.jpg").write_text("a brown dog")
    browser_page.goto(address)
    browser_page.set_input_files("#picture input[type=file]", tmp_path / "text.jpg")
    browser_page.get_by_text("no picture").first.wait_for()
