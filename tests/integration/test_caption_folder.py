"""Captioning a folder of pictures: killed and taken up again, in another precision, with other settings."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import compose, tiny_overrides, write_colour_table
from PIL import Image
from safetensors.torch import load_file, save_file
from started import Started

from efficap.commands import caption as command
from efficap.commands.caption import caption
from efficap.commands.evaluate import evaluate
from efficap.commands.run_dir import RunDirectory
from efficap.commands.train import train
from efficap.errors import InputError
from efficap.models.bridge import Bridge
from efficap.models.encoder import ImageEncoder
from efficap.training.writer import CaptionWriter

pytestmark = pytest.mark.slow
PICTURES = 40


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; its pictures lie in the folder ``colours/images`` beside it."""
    folder = write_colour_table(tmp_path_factory.mktemp("runs") / "colours")
    return train(compose("train", *tiny_overrides(folder, folder.parent / "run"), "trainer.max_epochs=1"))


@pytest.fixture
def pictures(run: Path) -> Path:
    return run.parent / "colours/images"


def settings(run: Path, images: Path, out: Path | None) -> list[str]:
    named = [f"out={out}"] if out else []
    return [f"run={run}", f"images={images}", *named, "num_workers=0", "accelerator=cpu"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "captions.jsonl").read_bytes().splitlines()]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that are captioned from now on."""
    names: list[str] = []
    write = CaptionWriter.write

    def noted(self: CaptionWriter, images: torch.Tensor, image_ids: list[str], **options: Any) -> Any:
        names.extend(image_ids)
        return write(self, images, image_ids, **options)

    monkeypatch.setattr(CaptionWriter, "write", noted)
    return names


def test_a_killed_run_is_gone_on_with_and_gives_what_an_undisturbed_one_gives(
    run: Path, pictures: Path, tmp_path: Path, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    images, killed, whole = tmp_path / "images", tmp_path / "killed", tmp_path / "whole"
    images.mkdir()
    for number in range(PICTURES):
        shutil.copy(pictures / f"train_{number % 8}.jpg", images / f"{number:03}.jpg")
    (images / "broken.jpg").write_bytes(b"no picture")
    slowly = ["decoding=beam", "decoding.num_beams=2", "decoding.batch_size=1"]
    process = Started("caption.py", *settings(run, images, killed), *slowly)
    journal = killed / "captions.jsonl"
    deadline = time.monotonic() + 90
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "it was still at work"
    done = [row["file"] for row in lines(killed)]
    assert 5 <= len(done) < PICTURES
    assert not (killed / "captions.csv").exists()
    with journal.open("ab") as file:
        file.write(b'{"file": "half a li')

    caption(compose("caption", *settings(run, images, killed), *slowly))
    assert len(written) == PICTURES - len(done)
    assert not set(written) & set(done), "no picture was captioned twice"
    assert f"{len(done)} of {PICTURES + 1} files are done" in capsys.readouterr().err
    caption(compose("caption", *settings(run, images, whole), *slowly))
    for name in ("captions.jsonl", "captions.csv"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert [Path(row["file"]).name for row in lines(whole)] == [
        *(f"{number:03}.jpg" for number in range(PICTURES)),
        "broken.jpg",
    ]
    assert (killed / "index.html").read_text().count("<img") == PICTURES


def test_a_picture_that_is_too_narrow_gets_its_reason(run: Path, pictures: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(pictures / "train_0.jpg", images / "0.jpg")
    Image.new("1", (4000, 1)).save(images / "1.png")
    captioned, narrow = caption(compose("caption", *settings(run, images, tmp_path / "out")))
    assert captioned.caption
    assert narrow.error == "too narrow: 4000 x 1 pixels, the limit is 64 to 1"
    assert [row["error"] for row in lines(tmp_path / "out")] == ["", narrow.error]


def test_a_finished_folder_is_left_as_it_is(
    run: Path, pictures: Path, tmp_path: Path, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = caption(compose("caption", *settings(run, pictures, tmp_path)))
    assert len(written) == 16
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    capsys.readouterr()
    again = caption(compose("caption", *settings(run, pictures, tmp_path), "decoding.batch_size=3"))
    assert again == first
    assert len(written) == 16, "nothing was captioned again"
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    assert "16 captioned, 0 left out; 16 of them were done before" in capsys.readouterr().out


@pytest.mark.parametrize("missing", [["captions.csv"], ["captions.csv", "index.html"]])
def test_the_table_and_the_page_are_made_up_for_where_only_they_are_missing(
    run: Path, pictures: Path, tmp_path: Path, written: list[str], missing: list[str]
) -> None:
    caption(compose("caption", *settings(run, pictures, tmp_path)))
    table = (tmp_path / "captions.csv").read_bytes()
    for name in missing:
        (tmp_path / name).unlink()
    caption(compose("caption", *settings(run, pictures, tmp_path)))
    assert (tmp_path / "captions.csv").read_bytes() == table
    assert len(written) == 16


def test_pictures_that_came_later_are_added(
    run: Path, pictures: Path, tmp_path: Path, written: list[str]
) -> None:
    caption(compose("caption", *settings(run, pictures / "test_*.jpg", tmp_path)))
    caption(compose("caption", *settings(run, pictures, tmp_path)))
    assert len(written) == 16
    assert [row["file"] for row in lines(tmp_path)] == sorted(written)
    assert (tmp_path / "captions.csv").read_text().count("\n") == 17


def test_a_picture_that_could_not_be_read_is_captioned_once_it_can_be(
    run: Path, pictures: Path, tmp_path: Path, written: list[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    shutil.copy(pictures / "train_0.jpg", images / "0.jpg")
    (images / "1.jpg").write_bytes(b"half a picture")
    caption(compose("caption", *settings(run, images, out)))
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    caption(compose("caption", *settings(run, images, out)))
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before, "it still cannot"
    shutil.copy(pictures / "train_1.jpg", images / "1.jpg")
    assert all(result.caption for result in caption(compose("caption", *settings(run, images, out))))
    assert written == [str(images / name) for name in ("0.jpg", "1.jpg")]
    assert [row["error"] for row in lines(out)] == ["", ""]


def test_an_interrupted_run_says_what_goes_on_with_it(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.CaptionFolder, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        caption(compose("caption", *settings(run, pictures, None)))
    start, end = capsys.readouterr().err.splitlines()
    out = start.rpartition("out=")[2].removesuffix(" goes on")
    assert Path(out).parent == run / "captions"
    assert end == f"interrupted; the same with out={out} goes on"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoding=beam", "holds captions of another decoding: .*; name another folder with out=DIR"),
        ("precision=bfloat16", "holds captions of another precision: float32, not bfloat16; name another"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    run: Path, pictures: Path, tmp_path: Path, change: str, message: str
) -> None:
    caption(compose("caption", *settings(run, pictures, tmp_path)))
    with pytest.raises(InputError, match=message):
        caption(compose("caption", *settings(run, pictures, tmp_path), change))


def test_a_run_that_has_moved_goes_on_with_its_captions(
    run: Path, pictures: Path, tmp_path: Path, written: list[str]
) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    caption(compose("caption", *settings(own, pictures / "test_*.jpg", own / "captions/mine")))
    moved = own.rename(tmp_path / "moved")
    out = moved / "captions/mine"
    caption(compose("caption", *settings(moved, pictures, out)))
    assert len(written) == len(set(written)) == 16
    record = json.loads((out / "captioning.json").read_text())
    del record["weights"]  # as earlier versions wrote it
    (out / "captioning.json").write_text(json.dumps(record))
    with pytest.raises(
        InputError, match=r"holds captions of another run: .*/run, not .*/moved; name another"
    ):
        caption(compose("caption", *settings(moved, pictures, out)))


def test_results_of_other_weights_are_not_mixed(run: Path, pictures: Path, tmp_path: Path) -> None:
    own = shutil.copytree(run, tmp_path / "run")
    caption(compose("caption", *settings(own, pictures, tmp_path / "out")))
    weights = load_file(own / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, own / "model.safetensors")
    with pytest.raises(
        InputError, match=r"holds captions of other weights: .*; name another folder with out"
    ):
        caption(compose("caption", *settings(own, pictures, tmp_path / "out")))
    record = json.loads((tmp_path / "out" / "captioning.json").read_text())
    del record["weights"]  # as earlier versions wrote it
    (tmp_path / "out" / "captioning.json").write_text(json.dumps(record))
    caption(compose("caption", *settings(own, pictures, tmp_path / "out")))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("captions.jsonl", "", r"captions.jsonl has no captioning.json beside it .*out=DIR"),
        ("captioning.json", None, r"captions.jsonl: line 2 is no picture's .*; remove it, or name another"),
    ],
)
def test_results_that_cannot_be_gone_on_with_are_named(
    run: Path, pictures: Path, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is None:
        caption(compose("caption", *settings(run, pictures / "test_0.jpg", tmp_path)))
        with (tmp_path / "captions.jsonl").open("a") as file:
            file.write("{}\n")
    else:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        caption(compose("caption", *settings(run, pictures, tmp_path)))


def test_a_setting_of_the_decoding_changes_that_of_the_run(run: Path, pictures: Path, tmp_path: Path) -> None:
    """Without a choice of method: the rest stays as the run validated."""
    changed = ["decoding.batch_size=2", "+decoding.max_tokens=6", "+decoding.prefix='all of'"]
    caption(compose("caption", *settings(run, pictures, tmp_path), *changed))
    own = yaml.safe_load((run / "config.yaml").read_text())["decoding"]
    record = json.loads((tmp_path / "captioning.json").read_text())
    expected = own | {"max_tokens": 6, "prefix": "all of"}
    # What changes no caption is left out: the batch, and evidence of no weight, which folders of earlier versions lack.
    assert record["decoding"] == {
        name: value for name, value in expected.items() if name not in ("batch_size", "evidence")
    }
    assert own["max_tokens"] == 12
    assert all(len(row["captions"][0]["tokens"]) <= 6 for row in lines(tmp_path))
    scores = evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]", "gallery=0", *changed))
    assert "greedy: max_tokens=6" in str(scores["decoding"])
    assert "batch_size" not in str(scores["decoding"])


def test_a_run_from_before_there_was_a_batch_size_is_used(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    shutil.copytree(run, old)
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["decoding"]["batch_size"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    for change in ([], ["decoding.batch_size=3"]):
        scores = evaluate(compose("eval", f"run={old}", "metrics=[CIDEr]", "gallery=0", *change))
        assert scores["images"] == 4
    assert len(caption(compose("caption", *settings(old, pictures, tmp_path / "out")))) == 16


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        (["decoding.batch_size=3"], [3, 1]),
        (["decoding.batch_size=3", "+data.batch_size=2"], [2, 2]),
        ([], [4]),
    ],
)
def test_evaluation_loads_what_is_decoded_at_a_time(
    run: Path, changes: list[str], sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    write = CaptionWriter.write

    def noted(self: CaptionWriter, images: torch.Tensor, image_ids: list[str]) -> Any:
        batches.append(len(images))
        return write(self, images, image_ids)

    monkeypatch.setattr(CaptionWriter, "write", noted)
    evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]", "gallery=0", *changes))
    assert batches == sizes


@pytest.mark.parametrize("has_it", [False, True])
def test_captions_are_written_in_bfloat16(
    run: Path,
    pictures: Path,
    tmp_path: Path,
    has_it: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("efficap.commands.placement.bfloat16_is_slow", lambda: not has_it)
    dtypes: list[set[torch.dtype]] = []
    load = RunDirectory.captioner

    def noted(self: RunDirectory, *arguments: Any, **options: Any) -> Any:
        captioner = load(self, *arguments, **options)
        dtypes.append(
            {tensor.dtype for tensor in captioner.state_dict().values() if tensor.is_floating_point()}
        )
        return captioner

    monkeypatch.setattr(RunDirectory, "captioner", noted)
    half, full = tmp_path / "half", tmp_path / "full"
    caption(compose("caption", *settings(run, pictures, half), "precision=bfloat16"))
    assert ("precision=float32 is faster" in capsys.readouterr().err) == (not has_it)
    caption(compose("caption", *settings(run, pictures, full)))
    assert dtypes == [{torch.bfloat16}, {torch.float32}]
    for rounded, exact in zip(lines(half), lines(full), strict=True):
        assert rounded["captions"][0]["score"] == pytest.approx(exact["captions"][0]["score"], rel=0.05)
    assert lines(half) != lines(full)
    assert json.loads((half / "captioning.json").read_text())["precision"] == "bfloat16"
    scores = evaluate(
        compose("eval", f"run={run}", "accelerator=cpu", "metrics=[CIDEr]", "gallery=0", "precision=bfloat16")
    )
    assert scores["precision"] == "bfloat16"


@pytest.mark.parametrize("change", ["precision=int8", "precision=16"])
def test_an_unknown_precision_is_refused_before_anything_is_loaded(
    run: Path, pictures: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(RunDirectory, "captioner", never)
    message = f"{change} must be float32, bfloat16, or null"
    commands: list[tuple[Callable[..., Any], dict[str, Any]]] = [
        (caption, compose("caption", *settings(run, pictures, tmp_path / "out"), change)),
        (evaluate, compose("eval", f"run={run}", change)),
    ]
    for function, cfg in commands:
        with pytest.raises(InputError, match=message):
            function(cfg)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_decoding_writes_the_same_captions(
    run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (ImageEncoder, Bridge):  # whose shapes are the same each time: test_models compiles them
        monkeypatch.setattr(part, "compile", lambda *_, **__: None)
    for out, compiled in ((tmp_path / "plain", False), (tmp_path / "compiled", True)):
        caption(compose("caption", *settings(run, pictures, out), f"compile={compiled}", "decoding=beam"))
    for found, expected in zip(lines(tmp_path / "compiled"), lines(tmp_path / "plain"), strict=True):
        assert found["captions"][0]["tokens"] == expected["captions"][0]["tokens"]
        assert found["captions"][0]["score"] == pytest.approx(expected["captions"][0]["score"], abs=1e-3)
