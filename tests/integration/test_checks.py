"""The checks of eval.py, on a model that learned from pictures and on one that learned from noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import compose, tiny_overrides, write_colour_table, write_random_run
from PIL import Image

from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.evaluation.results import read_scores

METRICS = "metrics=[BLEU,ROUGE-L,CIDEr]"


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_table(tmp_path_factory.mktemp("colours") / "colours", train=32, val=4, test=24)


@pytest.fixture(scope="module")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    write_colour_table(folder / "colours")
    return write_random_run(folder / "run")


def trained_on(table: Path, run: Path) -> Path:
    longer = ["trainer.max_epochs=40", "trainer.check_val_every_n_epoch=40", "data.batch_size=8"]
    return train(compose("train", *tiny_overrides(table, run), *longer))


def evaluated(run: Path, *overrides: str) -> dict[str, Any]:
    return evaluate(compose("eval", f"run={run}", METRICS, "gallery=0", "accelerator=cpu", *overrides))


@pytest.mark.slow
def test_a_model_that_learned_from_pictures_looks_at_them(
    colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluated(trained_on(colours, tmp_path / "run"))
    checks = scores["checks"]
    assert checks["verdict"] == "yes"
    assert checks["loss_gap"] > 0.15, (
        "one token in four or five is the colour, and a quarter is exchanged for its own"
    )
    assert checks["CIDEr_gap"] == pytest.approx(scores["CIDEr"] - scores["CIDEr-shuffled"])
    assert checks["copied"] == 1.0, "there are no other captions of a colour"
    assert checks["novel_words"] == 0.0
    assert checks["reference_vocabulary"] == 6  # a picture red green blue grey
    said = capsys.readouterr().out
    assert f"looks at the picture: yes (loss gap {checks['loss_gap']:.2f}, CIDEr gap" in said
    assert scores["signature"] in said
    for name, (low, high) in scores["intervals"].items():
        assert low - 1e-6 <= scores[name] <= high + 1e-6
    assert list(scores["intervals"]) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


@pytest.mark.slow
def test_a_model_that_learned_from_noise_does_not(colours: Path, tmp_path: Path) -> None:
    noisy = write_colour_table(tmp_path / "noisy", train=32, val=4, test=24)
    rng = np.random.default_rng(0)
    for file in [*(noisy / "images").glob("train_*"), *(noisy / "images").glob("val_*")]:
        Image.fromarray(rng.integers(0, 256, (72, 80, 3), dtype=np.uint8)).save(file)
    checks = evaluated(trained_on(noisy, tmp_path / "run"))["checks"]
    assert checks["verdict"] == "no"
    assert abs(checks["loss_gap"]) < 0.05


def test_another_table_is_not_taken_for_the_one_that_was_learned(random_run: Path, colours: Path) -> None:
    elsewhere = [f"+data.table={colours}/captions.csv", f"+data.image_dir={colours}/images"]
    checks = evaluated(random_run, *elsewhere)["checks"]
    assert "copied" in checks, "the run's own table is still where it was"
    table = random_run.parent / "colours/captions.csv"
    away = table.rename(table.with_suffix(".away"))
    try:
        checks = evaluated(random_run, *elsewhere)["checks"]
    finally:
        away.rename(table)
    assert checks.keys().isdisjoint({"copied", "novel_words"})
    assert "loss_gap" in checks


def test_what_is_not_asked_for_or_cannot_be_had_is_left_out_and_said(
    random_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "instances.json"
    other.write_text(json.dumps({"images": [], "categories": [], "annotations": []}))
    scores = evaluated(
        random_run, "checks.loss_pictures=0", "intervals.resamples=0", f"checks.instances={other}"
    )
    assert scores == read_scores(random_run / "eval/test/scores.json")
    assert scores["intervals"] == {}
    assert "loss_gap" not in scores["checks"]
    assert "checks.instances has none of the 4 pictures" in capsys.readouterr().out


def test_a_reference_longer_than_the_decoder_reads_is_cut_for_the_loss(
    random_run: Path, tmp_path: Path
) -> None:
    table = write_colour_table(tmp_path / "long")
    captions = table / "captions.csv"
    captions.write_text(captions.read_text().replace("a red picture", "a red picture " * 40))
    longer = [f"+data.table={captions}", f"+data.image_dir={table}/images", "+data.max_tokens=200"]
    assert "loss_gap" in evaluated(random_run, *longer, "metrics=[]")["checks"]


def test_the_loss_does_not_depend_on_batches_and_encodes_nothing_twice(
    random_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efficap.models.captioner import CaptionModel

    encoded: list[int] = []
    encode = CaptionModel.encode

    def counting(self: CaptionModel, images: Any) -> Any:
        encoded.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(CaptionModel, "encode", counting)
    gaps = [
        evaluated(random_run, f"decoding.batch_size={size}", "metrics=[]")["checks"]["loss_gap"]
        for size in (1, 4)
    ]
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-5)
    assert encoded == [1, 1, 1, 1, 4]
