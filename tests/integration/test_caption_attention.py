"""caption.py attention=true: what it leaves for programs and on the page, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose, write_colour_table, write_random_run

from efficap.commands.caption import caption
from efficap.commands.run_dir import RunDirectory
from efficap.data.pictures import Picture
from efficap.data.transforms import EvaluationTransform
from efficap.errors import InputError
from efficap.models.build import preprocessing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_colour_table(folder / "colours")
    return write_random_run(folder / "run")


def settings(run: Path, out: Path, *more: str) -> dict[str, Any]:
    images = f"images={run.parent}/colours/images/test_*.jpg"
    return compose("caption", f"run={run}", images, f"out={out}", "num_workers=0", "accelerator=cpu", *more)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]


@torch.no_grad()
def test_each_word_has_its_probability_and_where_the_model_looked(run: Path, tmp_path: Path) -> None:
    caption(settings(run, tmp_path, "attention=true"))
    directory = RunDirectory(run)
    captioner = directory.captioner(directory.tokenizer(), torch.device("cpu"))
    transform = EvaluationTransform(**preprocessing(directory.config["model"]))
    rows = lines(tmp_path)
    assert len(rows) == 4
    for row in rows:
        assert "".join(word["text"] for word in row["words"]) == row["caption"]
        best = row["captions"][0]
        product = math.prod(word["probability"] for word in row["words"])
        last = best["token_log_probs"][-1] if best["ended"] else 0.0  # EOS is no word
        assert product == pytest.approx(math.exp(sum(best["token_log_probs"]) - last), rel=0.01)
        image = transform(Picture(Path(row["file"])))[None]
        tokens = torch.tensor([[best["tokens"][:-1]]])
        weights = captioner.cross_attention(image, tokens)[0, 0].mean(dim=(0, 1))  # (T - 1, N)
        words = directory.tokenizer().words(best["tokens"][1:])
        for word, (_, places) in zip(row["words"], words, strict=True):
            expected = weights[places].mean(dim=0).unflatten(0, (2, 2))
            np.testing.assert_allclose(word["attention"], expected.numpy(), rtol=2e-3)
    html = (tmp_path / "index.html").read_text()
    assert html.count('class="word"') == html.count('class="look"') == sum(len(row["words"]) for row in rows)
    assert "Point at a word" in html


def test_a_stopped_start_is_gone_on_with_to_the_same_page(run: Path, tmp_path: Path) -> None:
    options = ["attention=by_head", "rollout=true", "decoding.batch_size=1"]
    caption(settings(run, tmp_path / "whole", *options))
    caption(settings(run, tmp_path / "part", *options))
    file = tmp_path / "part" / "captions.jsonl"
    first = file.read_bytes().splitlines(keepends=True)[0]
    file.write_bytes(first + b'{"file": "half a')
    (tmp_path / "part" / "index.html").unlink()
    caption(settings(run, tmp_path / "part", *options))
    for name in ("captions.jsonl", "captions.csv"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shown = [
        (tmp_path / name / "index.html").read_text().count('class="heads"') for name in ("part", "whole")
    ]
    assert shown[0] == shown[1] >= 4
    words = lines(tmp_path / "whole")[0]["words"]
    assert np.array(words[0]["attention"]).shape == (2, 4, 2, 2)
    assert np.array(words[0]["attention"]).sum((-1, -2)) == pytest.approx(1, abs=1e-3)


def test_without_it_nothing_changes_and_folders_are_not_mixed(run: Path, tmp_path: Path) -> None:
    caption(settings(run, tmp_path))
    assert "words" not in lines(tmp_path)[0]
    assert 'class="word"' not in (tmp_path / "index.html").read_text()
    with pytest.raises(InputError, match="another attention"):
        caption(settings(run, tmp_path, "attention=true"))
    record = json.loads((tmp_path / "captioning.json").read_text())
    del record["attention"]  # as earlier versions wrote it
    (tmp_path / "captioning.json").write_text(json.dumps(record))
    caption(settings(run, tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["attention=heads"], "attention=heads must be true, false or by_head"),
        (["rollout=true"], "rollout=true changes what attention=true shows"),
        (["attention=true", "images='{0..3}.tar'"], "attention=True is for pictures"),
    ],
)
def test_what_it_cannot_do_is_refused(run: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        caption(settings(run, tmp_path, *more))
