"""Captioning shards: killed and taken up again, shared by processes, broken ones among them."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import compose, tiny_overrides, write_colour_table
from PIL import Image
from started import Started
from tars import sample, write_tar

from efficap.commands.caption import caption
from efficap.commands.run_dir import RunDirectory
from efficap.commands.train import train
from efficap.data.shards.writer import ShardSettings, write_shards
from efficap.data.table import CaptionTable, read_table
from efficap.errors import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run_and_shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained run, and 20 shards of 6 pictures."""
    folder = write_colour_table(tmp_path_factory.mktemp("colours"))
    run = train(compose("train", *tiny_overrides(folder, folder / "run"), "trainer.max_epochs=1"))
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    tables, _ = read_table(folder / "captions.csv", folder / "images", **columns)
    train_split = tables["train"]
    names = [f"{copy}_{name}" for copy in range(15) for name in train_split.image_ids]
    table = CaptionTable.of("many", names, train_split.files * 15, train_split.references * 15)
    write_shards(table, folder / "shards", ShardSettings(6, None, 10**6), workers=1)
    return run, folder / "shards"


def start(run: Path, shards: Path, out: Path) -> Started:
    settings = [
        f"run={run}",
        f"images={shards}",
        f"out={out}",
        "decoding.batch_size=4",
        "num_workers=0",
        "accelerator=cpu",
    ]
    return Started("caption.py", *settings, "decoding=beam", "decoding.num_beams=2")


def lines(out: Path) -> list[str]:
    return sorted(line for file in out.glob("*.jsonl") for line in file.read_text().splitlines())


def test_a_run_killed_three_times_gives_what_an_undisturbed_one_gives(
    run_and_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    run, shards = run_and_shards
    whole = start(run, shards, tmp_path / "whole")
    assert whole.wait(120) == 0
    killed = tmp_path / "killed"
    for done in (3, 8, 14):
        process = start(run, shards, killed)
        deadline = time.monotonic() + 60
        while len(list(killed.glob("*.parquet"))) < done and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL, "it was still at work"
    before = {file: file.stat().st_mtime_ns for file in killed.glob("*.parquet")}
    assert 14 <= len(before) < 20
    last = start(run, shards, killed)
    assert last.wait(120) == 0
    assert lines(killed) == lines(tmp_path / "whole")
    assert len(lines(killed)) == 120
    assert all(file.stat().st_mtime_ns == mtime for file, mtime in before.items()), "no shard was done twice"


def test_processes_share_the_shards(run_and_shards: tuple[Path, Path], tmp_path: Path) -> None:
    run, shards = run_and_shards
    processes = [start(run, shards, tmp_path) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    counts = [
        int(found[1])
        for process in processes
        if (found := re.search(r"(\d+) pictures captioned", process.errors))
    ]
    assert sum(counts) == 120, "each picture once, by one of the two"
    assert len(counts) == 2
    assert len(lines(tmp_path)) == 120


def test_parquet_and_lines_say_the_same(run_and_shards: tuple[Path, Path], tmp_path: Path) -> None:
    run, shards = run_and_shards
    settings = [f"run={run}", f"images={shards}/00000.tar", f"out={tmp_path}", "num_workers=0"]
    caption(compose("caption", *settings, "decoding=nucleus", "decoding.num_return_sequences=3"))
    table = pd.read_parquet(tmp_path / "00000.parquet")
    rows = [json.loads(line) for line in (tmp_path / "00000.jsonl").read_text().splitlines()]
    assert table["key"].tolist() == [row["key"] for row in rows]
    assert table["caption"].tolist() == [row["caption"] for row in rows]
    assert [len(captions) for captions in table["captions"]] == [3] * 6
    first = table["captions"][0][0]
    assert first["text"] == table["caption"][0]
    assert first["score"] == pytest.approx(sum(first["token_log_probs"]), abs=1e-3)


def test_broken_samples_and_shards_get_a_reason(
    run_and_shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = run_and_shards
    with tarfile.open(shards / "00000.tar") as source, tarfile.open(tmp_path / "broken.tar", "w") as broken:
        for number, member in enumerate(member for member in source if member.name.endswith(".jpg")):
            member.size = 50 if number == 2 else member.size
            broken.addfile(member, source.extractfile(member.name))
        narrow = io.BytesIO()
        Image.new("1", (4000, 1)).save(narrow, "PNG")
        member = tarfile.TarInfo("narrow.png")
        member.size = len(narrow.getvalue())
        broken.addfile(member, io.BytesIO(narrow.getvalue()))
    (tmp_path / "empty.tar").write_bytes(b"")
    out = tmp_path / "out"
    caption(compose("caption", f"run={run}", f"images={tmp_path}", f"out={out}", "num_workers=0"))
    rows = [json.loads(line) for line in lines(out)]
    reasons = [row["error"] for row in rows if row["error"]]
    assert len(rows) == 8
    assert sorted(reason.partition(":")[0] for reason in reasons) == ["empty tar", "too narrow", "truncated"]
    assert all(bool(row["caption"]) != bool(row["error"]) for row in rows)
    said = capsys.readouterr().err
    assert f"{tmp_path}/empty.tar: empty tar; once it changes it is captioned again\n" in said
    assert "5 pictures captioned, 2 left out (the column error says why); 2 of 2 shards are done" in said


def test_a_members_name_that_is_no_text_costs_its_sample_alone(
    run_and_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    run, _ = run_and_shards
    odd = ("caf\udce9", "../caf\udce9")  # as tarfile reads a byte that is no UTF-8
    write_tar(tmp_path / "odd.tar", [member for key in ("good", *odd) for member in sample(key, "x")])
    out = tmp_path / "out"
    caption(compose("caption", f"run={run}", f"images={tmp_path}/odd.tar", f"out={out}", "num_workers=0"))
    errors = {row["key"]: row["error"] for row in map(json.loads, lines(out))}
    assert errors.pop("good") == ""
    assert errors.keys() == {r"caf\udce9", r"../caf\udce9"}
    assert all(error.startswith("unsafe name: ") for error in errors.values())
    assert pd.read_parquet(out / "odd.parquet")["key"].tolist() == ["good", r"caf\udce9", r"../caf\udce9"]


def test_a_shard_that_was_not_whole_is_captioned_again_when_it_is(
    run_and_shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = run_and_shards
    data, tar, out = (shards / "00000.tar").read_bytes(), tmp_path / "00000.tar", tmp_path / "out"
    settings = [f"run={run}", f"images={tar}", f"out={out}", "num_workers=0"]
    tar.write_bytes(data[: len(data) // 2])
    caption(compose("caption", *settings))
    assert f"{tar}: cut tar; once it changes it is captioned again" in capsys.readouterr().err
    assert len(lines(out)) < 6
    tar.write_bytes(data)
    caption(compose("caption", *settings))
    said = capsys.readouterr().err
    assert "1 of 1 shards have changed since; these are captioned once more" in said
    assert "6 pictures captioned; 1 of 1 shards are done" in said
    assert len(lines(out)) == len(pd.read_parquet(out / "00000.parquet")) == 6
    caption(compose("caption", *settings))
    assert "0 pictures captioned; 1 of 1 shards are done" in capsys.readouterr().err


@pytest.mark.parametrize("of", ["another data set", "an earlier version"])
def test_results_that_are_not_the_shards_are_refused_before_anything_is_loaded(
    run_and_shards: tuple[Path, Path], tmp_path: Path, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, shards = run_and_shards
    settings = [f"run={run}", f"out={tmp_path}/out", "num_workers=0"]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shutil.copy2(shards / "00000.tar", tmp_path / name)
    caption(compose("caption", *settings, f"images={tmp_path}/first"))
    results, again = tmp_path / "out/00000.parquet", "second"
    if of == "an earlier version":
        pq.write_table(pq.read_table(results).replace_schema_metadata(None), results)
        again = "first"
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(RunDirectory, "captioner", never)
    reason = "00000.parquet (has the captions of .*first/00000.tar, not of|does not say which tar)"
    with pytest.raises(InputError, match=rf"{reason}.*; name another folder with out=DIR"):
        caption(compose("caption", *settings, f"images={tmp_path}/{again}"))
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_results_of_another_decoding_are_not_mixed(run_and_shards: tuple[Path, Path], tmp_path: Path) -> None:
    run, shards = run_and_shards
    settings = [f"run={run}", f"images={shards}/00000.tar", f"out={tmp_path}", "num_workers=0"]
    caption(compose("caption", *settings))
    with pytest.raises(
        InputError, match=r"holds captions of another decoding: .*; name another folder with out=DIR"
    ):
        caption(compose("caption", *settings, "decoding=beam"))
    with pytest.raises(InputError, match=r"holds captions of another precision: .*; name another folder"):
        caption(compose("caption", *settings, "precision=bfloat16", "accelerator=cpu"))


def test_another_batch_size_goes_on(
    run_and_shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, shards = run_and_shards
    settings = [f"run={run}", f"images={shards}/0000{{0..1}}.tar", f"out={tmp_path}", "num_workers=0"]
    caption(compose("caption", *(s.replace("{0..1}", "0") for s in settings), "decoding.batch_size=2"))
    quoted = [f"images='{shards}/0000{{0..1}}.tar'" if s.startswith("images") else s for s in settings]
    caption(compose("caption", *quoted, "decoding.batch_size=5"))
    said = capsys.readouterr().err.replace("\n", " ")
    assert "6 pictures captioned; 2 of 2 shards are done" in said
    assert len(lines(tmp_path)) == 12
