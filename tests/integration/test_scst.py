"""Trainings that start from a run: self-critical ones above all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import compose, tiny_overrides, write_colour_table, write_random_run
from safetensors.torch import load_file
from started import Started

from efficap.commands.evaluate import evaluate
from efficap.commands.init_from import with_model_of
from efficap.commands.run_dir import RunDirectory
from efficap.commands.train import train
from efficap.errors import InputError

pytestmark = pytest.mark.slow

SCST = ["training=scst", "trainer.max_epochs=2"]
LONGER = ["trainer.max_epochs=12", "trainer.check_val_every_n_epoch=12"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(table folder, run directory) of a training by cross-entropy."""
    folder = write_colour_table(tmp_path_factory.mktemp("colours"))
    run = tmp_path_factory.mktemp("outputs") / "start"
    return folder, train(compose("train", *tiny_overrides(folder, run), *LONGER))


def from_run(start: tuple[Path, Path], out: Path, *overrides: str) -> list[str]:
    """Overrides that name no model, with `init_from` in their place."""
    folder, run = start
    data = [o for o in tiny_overrides(folder, out) if not o.startswith("model")]
    return [*data, f"init_from={run}", *overrides]


def test_a_run_that_starts_from_another_is_named_after_its_model(
    start: tuple[Path, Path], tmp_path: Path
) -> None:
    """Not after the model that the command line would choose by itself."""
    before = shutil.copytree(start[1], tmp_path / "before")
    config = yaml.safe_load((before / "config.yaml").read_text())
    (before / "config.yaml").write_text(yaml.safe_dump({**config, "name": "small-csv"}))
    for init_from, name in ((before, "small-demo"), (tmp_path / "none", "tiny-demo")):
        shown = Started("train.py", f"init_from={init_from}", "--cfg", "job", "--resolve")
        assert shown.wait(120) == 0, shown.errors
        assert yaml.safe_load(shown.printed)["name"] == name


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_a_run_goes_on_self_critically_and_evaluates(
    start: tuple[Path, Path], tmp_path: Path, baseline: str
) -> None:
    changes = [
        *SCST,
        f"training.baseline={baseline}",
        "trainer.accumulate_grad_batches=2",
        "training.ema_decay=0.9",
    ]
    run = train(compose("train", *from_run(start, tmp_path / "run", *changes)))
    table = pd.read_csv(run / "metrics.csv")
    assert (table["train/reward"].dropna() >= 0).all()
    assert table["train/length"].dropna().between(2, 12).all()
    assert table["train/ended"].dropna().between(0, 1).all()
    assert {"val/loss", "val/CIDEr"} <= set(table.columns)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["init_from"] == str(start[1].resolve())
    assert config["model"] == RunDirectory(start[1]).config["model"]
    tokenizer = "tokenizer/tokenizer.json"
    assert (run / tokenizer).read_text() == (start[1] / tokenizer).read_text()
    scores = evaluate(compose("eval", f"run={run}", "split=val", "metrics=[CIDEr]"))
    best = json.loads((run / "metrics.json").read_text())["best"]
    assert scores["CIDEr"] == pytest.approx(best["val/CIDEr"], abs=1e-5)


def test_the_reward_rises(start: tuple[Path, Path], tmp_path: Path) -> None:
    changes = [
        "training=scst",
        "trainer.max_epochs=30",
        "trainer.check_val_every_n_epoch=30",
        "training.lr_scale=0.5",
    ]
    run = train(compose("train", *from_run(start, tmp_path / "run", *changes)))
    reward = pd.read_csv(run / "metrics.csv")["train/reward"].dropna()
    assert reward[-10:].mean() > 1.1 * reward[:10].mean()


def test_training_starts_from_the_runs_weights(start: tuple[Path, Path], tmp_path: Path) -> None:
    still = "optimizer.lr={encoder: 0.0, bridge: 0.0, decoder: 0.0}"
    run = train(compose("train", *from_run(start, tmp_path / "run", still, "trainer.max_epochs=1")))
    weights, expected = load_file(run / "model.safetensors"), load_file(start[1] / "model.safetensors")
    assert weights.keys() == expected.keys()
    statistics = [key for key in expected if "running" not in key and "num_batches" not in key]
    assert all(torch.equal(weights[key], expected[key]) for key in statistics)
    moved = "encoder.backbone.bn1.running_mean"
    assert not torch.equal(weights[moved], expected[moved]), "by cross-entropy, BatchNorm is in training"


def test_the_samples_of_a_training_are_reproducible(start: tuple[Path, Path], tmp_path: Path) -> None:
    tables = [
        pd.read_csv(train(compose("train", *from_run(start, tmp_path / name, *SCST))) / "metrics.csv")
        for name in ("one", "two")
    ]
    assert tables[0]["train/reward"].equals(tables[1]["train/reward"])


def with_start(start: tuple[Path, Path], *overrides: str) -> dict[str, Any]:
    cfg = compose("train", "name=x", "output_dir=o", "data=demo", f"init_from={start[1]}", *overrides)
    return with_model_of(RunDirectory(start[1]), cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.encoder.name=b0",
            r"model.encoder.name=b0 must be test_\S+, as in init_from=.*; leave model out",
        ),
        ("model.decoder.n_layer=3", r"model.decoder.n_layer=3 must be 2, as in init_from="),
        ("model=small", r"model\.\S+=\S+ must be \S+, as in init_from="),
    ],
)
def test_another_model_than_the_runs_is_refused(
    start: tuple[Path, Path], override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        with_start(start, override)


def test_what_fits_the_runs_model_may_be_said(start: tuple[Path, Path]) -> None:
    changes = [
        "model.image_size=64",
        "model.encoder.frozen=true",
        "model.lr.bridge=0.125",
        "optimizer.lr.encoder=0.25",
    ]
    cfg = with_start(start, *changes)
    expected = RunDirectory(start[1]).config["model"]
    expected["encoder"]["frozen"] = True
    expected["lr"]["bridge"] = 0.125
    assert cfg["model"] == expected
    assert cfg["optimizer"]["lr"] == {"encoder": 0.25, "bridge": 0.125, "decoder": expected["lr"]["decoder"]}


def test_a_rate_that_is_said_holds_where_it_is_the_default_models(tmp_path: Path) -> None:
    """A sweep over rates may meet that of model=tiny, which is not the run's."""
    run = RunDirectory(
        write_random_run(tmp_path / "run", "model.lr={encoder: 0.5, bridge: 0.5, decoder: 0.5}")
    )

    def rates(*overrides: str) -> list[float]:
        cfg = compose("train", "name=x", "output_dir=x", f"init_from={run.path}", *overrides)
        return list(with_model_of(run, cfg)["optimizer"]["lr"].values())

    assert rates() == [0.5, 0.5, 0.5]
    assert [rates(f"optimizer.lr.encoder={lr}")[0] for lr in ("1e-3", "2e-3", "4e-3")] == [1e-3, 2e-3, 4e-3]
    assert rates("++optimizer.lr.bridge=2e-3") == [0.5, 2e-3, 0.5]
    assert rates("optimizer.lr={encoder: 2e-3, bridge: 2e-3, decoder: 2e-3}") == [2e-3, 2e-3, 2e-3]
    assert rates("optimizer=muon") == [0.5, 0.5, 0.5], "its rates are the model's"


def test_of_two_configurations_each_holds_what_was_said_of_it(start: tuple[Path, Path]) -> None:
    begin = ["name=x", "output_dir=x", f"init_from={start[1]}"]
    frozen = compose("train", *begin, "model.encoder.frozen=true")
    other = compose("train", *begin, "model.bridge.dropout=0.5")
    run = RunDirectory(start[1])
    for cfg, wanted in ((frozen, (True, 0.0)), ({**frozen, "seed": 1}, (True, 0.0)), (other, (False, 0.5))):
        model = with_model_of(run, cfg)["model"]
        assert (model["encoder"]["frozen"], model["bridge"]["dropout"]) == wanted


def test_what_was_said_is_no_setting_of_a_run(start: tuple[Path, Path]) -> None:
    assert "overrides" not in RunDirectory(start[1]).config
    assert "overrides" not in compose("eval", "run=x")
    words = ["++name=x", "output_dir=x", "hydra.job.chdir=false", "hydra/launcher=basic", "seed=1"]
    assert compose("train", *words)["overrides"] == ["seed=1"]


def test_a_run_goes_on_with_larger_pictures_more_blocks_and_more_words(
    start: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = ["model.image_size=96", "model.bridge.n_blocks=2", "model.tokenizer.vocab_size=310"]
    overrides = from_run(
        start, tmp_path / "run", *changes, "optimizer.lr={encoder: 0.0, bridge: 0.0, decoder: 0.0}"
    )
    run = train(compose("train", *overrides, "trainer.max_epochs=1"))
    printed = capsys.readouterr().out
    assert f"init_from {start[1].parent.name}/start" in printed, "whatever link led to it"
    assert re.search(r"bridge.positions\s+│\s+1 │ 4 to 9 rows, interpolated", printed)
    assert re.search(r"bridge.blocks.1\s+│\s+12 │ fresh", printed)
    config = RunDirectory(run).config["model"]
    assert (config["image_size"], config["bridge"]["n_blocks"]) == (96, 2)
    before, after = (pd.read_csv(folder / "metrics.csv")["train/loss"].dropna() for folder in (start[1], run))
    assert after.iloc[0] == pytest.approx(before.iloc[-1], rel=0.1)
    assert before.iloc[0] > 1.25 * before.iloc[-1]  # what fresh weights would give


def test_a_run_that_is_not_there_is_named_by_its_setting(tmp_path: Path, colour_table: Path) -> None:
    overrides = tiny_overrides(colour_table, tmp_path / "run")
    with pytest.raises(InputError, match=r"init_from=nowhere does not exist; give a run directory"):
        train(compose("train", *overrides, "init_from=nowhere"))


def test_an_option_of_another_objective_is_refused(start: tuple[Path, Path], tmp_path: Path) -> None:
    overrides = from_run(start, tmp_path / "run", *SCST, "+training.label_smoothing=0.1")
    with pytest.raises(InputError, match=r"training.label_smoothing=0.1 is no option of training=scst"):
        train(compose("train", *overrides))


def test_the_command_line_is_heard(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Hydra keeps what was said where `with_model_of` looks for it."""
    overrides = from_run(start, tmp_path / "run", *SCST, "model.decoder.n_layer=3")
    process = Started("train.py", *overrides, f"hydra.run.dir={tmp_path / 'hydra'}")
    assert process.wait(300) == 1
    assert "model.decoder.n_layer=3 must be 2, as in init_from=" in process.errors
