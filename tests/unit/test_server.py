"""The zip for COCO's evaluation server, and what it is refused for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from efficap.errors import InputError
from efficap.evaluation.server import check_results, main

ROWS = [{"image_id": 42, "caption": "a dog"}, {"image_id": 7, "caption": "a cat"}]


def write(file: Path, content: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


@pytest.fixture
def image_list(tmp_path: Path) -> Path:
    return write(tmp_path / "image_info_test2014.json", {"images": [{"id": 7}, {"id": 42}]})


def test_the_zip_holds_both_files_under_the_servers_names(tmp_path: Path, image_list: Path) -> None:
    run = tmp_path / "run"
    val = write(tmp_path / "captions_val2014.json", {"images": [{"id": 5}], "annotations": []})
    write(run / "eval/val2014/results.json", [{"image_id": 5, "caption": "zwei Männer"}])
    write(run / "eval/test2014/results.json", ROWS)
    assert main(["our-model", str(run), "--val-images", str(val), "--test-images", str(image_list)]) == 0
    with zipfile.ZipFile(run / "eval/captions_our-model_results.zip") as archive:
        assert {name: json.loads(archive.read(name)) for name in archive.namelist()} == {
            "captions_val2014_our-model_results.json": [{"image_id": 5, "caption": "zwei Männer"}],
            "captions_test2014_our-model_results.json": ROWS,
        }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[:1], r"lacks those of .*: 1 \(7\) differ of 2"),
        ([*ROWS, {"image_id": 8, "caption": "a"}], r"has other pictures than those of .*: 1 \(8\)"),
        ([ROWS[0], ROWS[0]], "image_id 42 comes twice, again in entry 2"),
        ([{"image_id": "42", "caption": "a"}], "image_id '42' of entry 1 is no whole number"),
        ([{"image_id": True, "caption": "a"}], "image_id True of entry 1 is no whole number"),
        ([{"image_id": 42, "caption": " "}], "the caption ' ' of image_id 42 must be text and not empty"),
        ([{"image_id": 42, "caption": None}], "the caption None of image_id 42 must be text"),
        ([{"image_id": 42}], "entry 1 is no object with image_id and caption"),
        ({"42": "a"}, "must hold a list"),
    ],
)
def test_results_that_the_server_would_refuse_are_refused(
    rows: Any, message: str, tmp_path: Path, image_list: Path
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_results(write(tmp_path / "results.json", rows), image_list)
    assert "\n" not in str(caught.value)


def test_a_mistake_ends_with_one_line_and_no_zip(
    tmp_path: Path, image_list: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.zip"
    arguments = [str(tmp_path), "--val-images", str(image_list), "--test-images", str(image_list)]
    for name, message in (
        ("a_b", "the name 'a_b' must be of letters"),
        ("ab", "cannot be read (No such file"),
    ):
        assert main([name, *arguments, "--out", str(out)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not out.exists()
