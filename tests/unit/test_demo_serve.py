"""What the demo is asked on its command line: mistakes, names of runs, and what it listens at."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import compose, write_random_run
from PIL import Image

from efficap.demo.serve import _examples, _names, build_service, listen, serve
from efficap.errors import InputError


def settings(*overrides: str) -> dict[str, Any]:
    return compose("demo", "accelerator=cpu", *overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_run(tmp_path_factory.mktemp("demo_serve") / "run")


def test_a_port_that_is_taken_is_named_before_anything_is_loaded() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"host=127.0.0.1 port={port} cannot be listened at .*port=0"):
            serve(settings("run=missing", f"port={port}"))


def test_it_listens_to_this_machine_alone_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings("run=missing")
    with listen(cfg["host"], 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    assert not capsys.readouterr().err
    with listen("0.0.0.0", 0):
        assert "whoever reaches this machine can use it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run=missing", "run=missing does not exist"),
        ("run=[]", "run=.* names no run"),
        ("max_batch=0", "max_batch=0 must be above 0"),
        ("limits.max_tokens=2", "limits.max_tokens=2 must be a whole number of at least 3"),
        ("examples=missing", "examples=missing is neither a file"),
    ],
)
def test_a_mistake_is_named(override: str, message: str) -> None:
    pytest.importorskip("gradio", reason="the demo's packages are not installed: pip install 'efficap[demo]'")
    with pytest.raises(InputError, match=message):
        serve(settings("run=missing", "port=0", override))


def test_examples_are_pictures_that_a_request_may_send(tmp_path: Path) -> None:
    grey = Image.new("RGB", (40, 30), "grey")
    grey.save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"examples=.* holds no picture that the demo opens \(JPEG, PNG"):
        _examples(str(tmp_path))
    for number in range(10):
        grey.save(tmp_path / f"b{number}.png")
    assert _examples(str(tmp_path)) == [tmp_path / f"b{number}.png" for number in range(8)]


def test_no_phrases_leave_a_prefix_that_is_not_too_long(run: Path) -> None:
    service = build_service(settings(f"run={run}", "limits.phrases=0", "limits.letters=5"))
    [name] = service.captioners
    assert service.settings(name, "greedy", {"prefix": "a red"})["prefix"] == "a red"
    for changes in ({"prefix": "a green"}, {"banned": ["red"]}):
        with pytest.raises(InputError, match=r"at most [05] (letters|are)|0 are taken"):
            service.settings(name, "greedy", changes)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_random_run(tmp_path / name, f"name={name[0]}") for name in ("a1", "b", "a2")]
    service = build_service(settings(f"run=[{','.join(map(str, runs))}]"))
    assert list(service.captioners) == ["a-1", "b", "a-2"]
    assert [captioner.run.path for captioner in service.captioners.values()] == runs


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["a", "a", "a-1"], ["a-2", "a-3", "a-1"]),
        (["a-1", "a", "a-1", "a"], ["a-1-1", "a-2", "a-1-2", "a-3"]),
        (["a-1-1", "a-1", "a-1"], ["a-1-1", "a-1-2", "a-1-3"]),
        (["a", "b"], ["a", "b"]),
    ],
)
def test_a_number_makes_no_name_that_a_run_has(trained: list[str], expected: list[str]) -> None:
    runs = [SimpleNamespace(config={"name": name}) for name in trained]
    assert _names(runs) == expected


@pytest.mark.parametrize(
    ("beams", "returned", "tokens", "expected"),
    [
        (4, 10, 20, {"beam": (4, 1), "diverse": (3, 3), "nucleus": (None, 1), "constrained": (4, 1)}),
        (4, 2, 64, {"beam": (4, 1), "diverse": (3, 2), "constrained": (4, 1)}),
        (1, 1, 3, {"greedy": (None, None), "beam": (1, 1), "diverse": (1, 1), "constrained": (1, 1)}),
        (10, 10, 64, {"beam": (5, 1), "diverse": (6, 3), "constrained": (8, 1)}),
    ],
)
def test_the_page_offers_decodings_that_keep_low_limits_and_captions_with_them(
    beams: int,
    returned: int,
    tokens: int,
    expected: dict[str, tuple[int | None, int | None]],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gradio = pytest.importorskip(
        "gradio", reason="the demo's packages are not installed: pip install 'efficap[demo]'"
    )
    from efficap.demo.page import build_page

    limits = {"num_beams": beams, "num_return_sequences": returned, "max_tokens": tokens}
    given = (f"limits.{name}={value}" for name, value in limits.items())
    service = build_service(settings(f"run={run}", *given))
    events = list(build_page(service, []).fns.values())
    [choose] = [event for event in events if event.name == "choose"]
    caption = next(event.fn for event in events if event.name == "caption")
    for component in choose.outputs:
        if isinstance(component, gradio.Slider):
            assert component.minimum <= component.value <= component.maximum, component.label

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    asked: list[dict[str, Any]] = []
    work = service._work
    service._queue._work = lambda job, items: asked.append(json.loads(job.settings)) or work(job, items)

    async def ask() -> None:
        async with service.running():
            for decoding in expected:
                values = [update.get("value") for update in choose.fn(decoding)]
                await caption({"path": str(tmp_path / "red.png")}, decoding, *values)

    asyncio.run(ask())
    found = [(each.get("num_beams"), each.get("num_return_sequences")) for each in asked]
    assert dict(zip(expected, found, strict=True)) == expected
    assert {each["max_tokens"] for each in asked} == {min(tokens, 32)}
