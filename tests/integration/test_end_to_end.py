"""A tiny run from table to gallery: trained once, then evaluated and captioned in each test."""

from __future__ import annotations

import csv
import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import compose, tiny_overrides, write_colour_table, write_random_run
from hydra.errors import HydraException
from PIL import Image
from safetensors.torch import load_file
from wandb_files import finished_run

from efficap.commands.caption import caption, find_pictures
from efficap.commands.evaluate import evaluate
from efficap.commands.train import train
from efficap.errors import InputError
from efficap.evaluation.pictures import read_pictures
from efficap.training import run_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(table folder, run directory) of a training on plain colours."""
    folder = write_colour_table(tmp_path_factory.mktemp("colours"))
    run_dir = tmp_path_factory.mktemp("outputs") / "run"
    return folder, train(compose("train", *tiny_overrides(folder, run_dir)))


def test_a_run_directory_holds_all_that_its_evaluation_needs(trained: tuple[Path, Path]) -> None:
    _, run = trained
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["encoder"]["mean"] == [0.485, 0.456, 0.406], "preprocessing is resolved"
    assert (run / "tokenizer" / "tokenizer.json").is_file()
    weights = load_file(run / "model.safetensors")
    assert {key.partition(".")[0] for key in weights} == {"encoder", "bridge", "decoder"}
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["steps"] == 6, "3 epochs of 8 pictures in batches of 4"
    assert metrics["pairs"] == 48
    assert metrics["best"]["val/CIDEr"] >= metrics["last"]["val/CIDEr"]
    with Image.open(run / "curves.png") as curves:
        assert curves.width > 300
    table = pd.read_csv(run / "metrics.csv")
    assert {"train/loss", "val/loss", "val/CIDEr", "val/BLEU-4"} <= set(table.columns)
    assert len(list((run / "samples").glob("*.html"))) == 3


@pytest.mark.parametrize(("apart", "drawn"), [(0.0, 4), (3600.0, 1)])
def test_curves_are_drawn_at_the_end_and_at_validations_that_are_not_too_close(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, apart: float, drawn: int
) -> None:
    folder, _ = trained
    drawings: list[Path] = []
    monkeypatch.setattr(run_metrics, "CURVES_SECONDS", apart)
    monkeypatch.setattr(run_metrics, "plot_curves", lambda _, png: drawings.append(png))
    train(compose("train", *tiny_overrides(folder, tmp_path / "run")))
    assert drawings == [tmp_path / "run" / "curves.png"] * drawn, "three validations and the end"


def test_evaluation_writes_captions_then_scores(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained
    monkeypatch.undo()  # all is drawn
    scores = evaluate(compose("eval", f"run={run}", "metrics=[BLEU,CIDEr]"))
    captions = json.loads((run / "eval/test/captions.json").read_text())
    assert [row["image_id"] for row in captions] == [f"test_{n}.jpg" for n in range(4)]
    assert json.loads((run / "eval/test/scores.json").read_text()) == scores
    assert scores["split"] == "test"
    assert scores["images"] == 4
    pictures = read_pictures(run / "eval/test/pictures.parquet")
    assert [(p.image_id, p.caption) for p in pictures] == [(r["image_id"], r["caption"]) for r in captions]
    assert all(p.image and p.image.is_file() and len(p.references) == 2 and p.scores for p in pictures)
    page = (run / "eval/test/report.html").read_text()
    assert page.count('<script type="text/plain" id="picture') == 4
    with Image.open(run / "eval/test/sheet.png") as sheet:
        assert sheet.width > 4 * 300, "a row of four pictures"
    assert all(f">{name}<" in page for name in ("CIDEr", "BLEU-4", "distinct captions", "Training"))


def test_evaluation_decodes_as_it_is_told(trained: tuple[Path, Path]) -> None:
    _, run = trained
    scores = evaluate(
        compose("eval", f"run={run}", "split=val", "decoding=beam", "metrics=[CIDEr]", "gallery=0",
                "decoding.max_tokens=12")
    )  # fmt: skip
    assert scores["split"] == "val"
    assert not (run / "eval/val/report.html").exists()


def test_validation_and_evaluation_agree(trained: tuple[Path, Path]) -> None:
    """The weights kept are those that scored best, and evaluation sees the pictures as validation did."""
    _, run = trained
    scores = evaluate(compose("eval", f"run={run}", "split=val", "metrics=[CIDEr,BLEU]"))
    best = json.loads((run / "metrics.json").read_text())["best"]
    assert scores["CIDEr"] == pytest.approx(best["val/CIDEr"], abs=1e-5)
    assert scores["BLEU-4"] == pytest.approx(best["val/BLEU-4"], abs=1e-5)


def test_a_run_moved_elsewhere_still_evaluates(trained: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = trained
    moved = run.rename(tmp_path / "elsewhere")
    try:
        assert evaluate(compose("eval", f"run={moved}", "metrics=[CIDEr]"))["images"] == 4
    finally:
        moved.rename(run)


def test_a_run_on_the_built_in_pictures_is_evaluated_where_they_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(root: Path, *, seed: int) -> None:
        if root == Path("/dev/null/demo"):
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
        write_colour_table(root)

    monkeypatch.setattr("efficap.data.demo.module.write_demo", draw)
    run = write_random_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = compose("train", "name=x", "output_dir=x", "data.root=/dev/null/demo")["data"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    command = [f"run={run}", "metrics=[]", "gallery=0", "accelerator=cpu", "+data.num_workers=0"]
    with pytest.raises(InputError, match=r"cannot be written: Not a directory; .*, in eval.py (.*)$") as told:
        evaluate(compose("eval", *command))
    advice = str(told.value).partition("eval.py ")[2].replace("DIR", str(tmp_path / "demo")).split()
    assert evaluate(compose("eval", *command, *advice))["images"] == 4


def test_captioning_a_folder_lists_what_is_no_picture_and_goes_on(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    _, run = trained
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    red = Image.new("RGB", (70, 50), (200, 30, 30))
    for name in ("a.jpg", "b.png", "c.webp", "d.bmp", "e.tiff", "below/f.jpeg"):
        red.save(pictures / name)
    red.save(pictures / "g.gif", save_all=True, append_images=[Image.new("RGB", (70, 50))])
    (pictures / "broken.jpg").write_bytes(b"no picture")
    (pictures / "notes.txt").write_text("not looked at")
    results = caption(compose("caption", f"run={run}", f"images={pictures}", f"out={tmp_path / 'out'}"))
    assert {result.file.name: bool(result.error) for result in results} == {
        **dict.fromkeys(("a.jpg", "b.png", "c.webp", "d.bmp", "e.tiff", "f.jpeg", "g.gif"), False),
        "broken.jpg": True,
    }
    rows = list(csv.DictReader((tmp_path / "out/captions.csv").open()))
    lines = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text().splitlines()]
    assert rows == [{key: line[key] for key in ("file", "caption", "error")} for line in lines]
    assert [row["file"] for row in rows if row["error"]] == [str(pictures / "broken.jpg")]
    assert (tmp_path / "out/index.html").read_text().count("<img") == 7


def test_a_glob_and_a_single_file_are_found(trained: tuple[Path, Path]) -> None:
    folder, _ = trained
    assert len(find_pictures(f"{folder}/images/test_*.jpg")) == 4
    assert find_pictures(f"{folder}/images/test_0.jpg") == [folder / "images/test_0.jpg"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("nothing/*.jpg", "is neither a file, nor a folder, nor a glob"), (".", "holds no picture")],
)
def test_nothing_to_caption_is_refused(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_pictures(str(tmp_path / path))


def test_a_run_without_weights_is_refused(trained: tuple[Path, Path]) -> None:
    _, run = trained
    hidden = (run / "model.safetensors").rename(run / "hidden")
    try:
        with pytest.raises(InputError, match=r"holds no model.safetensors: training writes it at its first"):
            evaluate(compose("eval", f"run={run}"))
    finally:
        hidden.rename(run / "model.safetensors")


def test_damaged_weights_are_refused(trained: tuple[Path, Path]) -> None:
    _, run = trained
    file = run / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    try:
        with pytest.raises(InputError, match=r"model.safetensors is damaged"):
            evaluate(compose("eval", f"run={run}"))
    finally:
        file.write_bytes(whole)


def test_a_runs_configuration_imports_nothing(trained: tuple[Path, Path]) -> None:
    _, run = trained
    file = run / "config.yaml"
    whole = file.read_text()
    file.write_text(whole.replace("efficap.data.csv.CSVDataModule", "os.system"))
    try:
        with pytest.raises(InputError, match=r"data._target_=os.system is none of efficap"):
            evaluate(compose("eval", f"run={run}"))
    finally:
        file.write_text(whole)


def test_a_data_module_named_on_the_command_line_is_used_and_imports_nothing_else(
    trained: tuple[Path, Path], tmp_path: Path
) -> None:
    """Hydra would also build what is nested in the run's own settings."""
    _, run = trained
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["flip"] = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "touched")}
    (run / "config.yaml").rename(run / "whole")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    try:
        target = "+data._target_=efficap.data.csv.CSVDataModule"
        assert evaluate(compose("eval", f"run={run}", target, "metrics=[CIDEr]"))["images"] == 4
    finally:
        (run / "whole").rename(run / "config.yaml")
    assert not (tmp_path / "touched").exists()


def test_a_split_that_is_not_there_names_those_that_are(trained: tuple[Path, Path]) -> None:
    _, run = trained
    with pytest.raises(InputError, match=r"split=irregular: .*it has train \(8 pictures\), val"):
        evaluate(compose("eval", f"run={run}", "split=irregular"))


@pytest.mark.parametrize("value", [1.0, -0.1])
def test_an_average_that_never_moves_is_refused(colour_table: Path, tmp_path: Path, value: float) -> None:
    with pytest.raises(InputError, match=f"ema_decay={value} must be at least 0 and below 1"):
        train(
            compose("train", *tiny_overrides(colour_table, tmp_path / "run"), f"training.ema_decay={value}")
        )


def test_the_averaged_weights_are_validated_and_kept(colour_table: Path, tmp_path: Path) -> None:
    run = train(compose("train", *tiny_overrides(colour_table, tmp_path / "run"), "training.ema_decay=0.9"))
    checkpoint = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    key = "captioner.bridge.project.weight"
    assert not torch.equal(averaged[key], current[key])
    scores = evaluate(compose("eval", f"run={run}", "split=val", "metrics=[CIDEr]"))
    best = json.loads((run / "metrics.json").read_text())["best"]
    assert scores["CIDEr"] == pytest.approx(best["val/CIDEr"], abs=1e-5)


def test_a_clock_limit_ends_training_annealed_and_validated(colour_table: Path, tmp_path: Path) -> None:
    run = train(
        compose(
            "train",
            *tiny_overrides(colour_table, tmp_path / "run"),
            "trainer.max_epochs=-1",
            "trainer.max_time='00:00:00:02'",
            "trainer.check_val_every_n_epoch=null",
            "trainer.val_check_interval='00:01:00:00'",
        )
    )
    table = pd.read_csv(run / "metrics.csv")
    rates = table["lr-AdamW/encoder"].dropna()
    assert rates.iloc[-1] < 0.2 * rates.max()
    assert (run / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("limit", "precision"), [("trainer.max_steps=3", "32-true"), ("trainer.max_epochs=2", "bf16-mixed")]
)
def test_the_last_step_is_validated_whatever_the_interval(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, precision: str
) -> None:
    monkeypatch.setattr("efficap.commands.placement.bfloat16_is_slow", lambda *_: False)  # also where it is
    run = train(
        compose(
            "train",
            *tiny_overrides(colour_table, tmp_path / "run"),
            limit,
            f"trainer.precision={precision}",
            "trainer.check_val_every_n_epoch=null",
            "trainer.val_check_interval='00:01:00:00'",
        )
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["last"]["step"] == metrics["steps"] == (3 if "steps" in limit else 4)
    assert (run / "model.safetensors").is_file()


def test_without_any_validation_the_last_weights_are_kept(colour_table: Path, tmp_path: Path) -> None:
    overrides = tiny_overrides(colour_table, tmp_path / "run")
    run = train(compose("train", *overrides, "trainer.check_val_every_n_epoch=10"))
    assert evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]"))["images"] == 4


def test_a_run_on_relative_paths_evaluates_from_another_folder(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(colour_table)
    overrides = [
        *tiny_overrides(colour_table, tmp_path / "run"),
        "data.table=captions.csv",
        "data.image_dir=images",
    ]
    run = train(compose("train", *overrides, "trainer.max_epochs=1"))
    monkeypatch.chdir(tmp_path)
    assert evaluate(compose("eval", f"run={run}", "metrics=[CIDEr]"))["images"] == 4


def test_a_gpt2_with_other_arithmetic_is_refused(colour_table: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    (tmp_path / "other/config.json").write_text(json.dumps({**sizes, "activation_function": "relu"}))
    overrides = [*tiny_overrides(colour_table, tmp_path / "run"), "model.decoder.pretrained=true"]
    with pytest.raises(InputError, match=r"has activation_function=relu; only gelu_new"):
        train(
            compose(
                "train", *overrides, f"model.decoder.name={tmp_path / 'other'}", "model.tokenizer.name=null"
            )
        )


@pytest.mark.parametrize(
    "setting",
    re.findall(r"`([a-z_.]+=[^`…]+)`", (Path(__file__).parents[2] / "README.md").read_text()),
)
def test_every_setting_that_the_readme_names_composes(setting: str) -> None:
    needed = {"train": ["name=x", "output_dir=o"], "eval": ["run=r"], "caption": ["run=r", "images=i"]}
    refusals = []
    for command, given in needed.items():
        try:
            compose(command, *given, *setting.split())
        except HydraException as error:
            refusals.append(str(error))
            continue
        except InputError as error:  # it composes; where the pictures are, only its user can say
            if "is not given: add" not in str(error):
                raise
        return
    pytest.fail(f"no command takes it: {refusals}")


def test_pretrained_parts_come_from_directories(
    colour_table: Path, tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    """GPT-2 with its own tokenizer from folders, an EfficientNet from a file: no network is needed."""
    import timm
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = tmp_path / "gpt2"
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    theirs.half().save_pretrained(gpt2)
    encoder = timm.create_model("test_efficientnet")
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    run = train(
        compose(
            "train",
            *tiny_overrides(colour_table, tmp_path / "run"),
            "model.pretrained=true",
            f"model.decoder.name={gpt2}",
            f"model.tokenizer.name={shared('gpt2_bpe')}",
            f"model.encoder.weights_file={tmp_path / 'encoder.safetensors'}",
            "model.encoder.frozen=true",
            "optimizer.lr={encoder: 0.0, bridge: 0.0, decoder: 0.0}",
            "trainer.max_epochs=1",
        )
    )
    weights: dict[str, Any] = load_file(run / "model.safetensors")
    expected = theirs.transformer.h[1].mlp.c_fc.weight.T
    assert torch.equal(weights["decoder.h.1.mlp.c_fc.weight"], expected.float())
    assert weights["decoder.wpe.weight"].dtype == torch.float32
    key = "conv_stem.weight"
    assert torch.equal(weights[f"encoder.backbone.{key}"], encoder.state_dict()[key])
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["decoder"]["n_embd"] == 16


def test_wandb_needs_no_login_and_runs_of_one_process_stay_apart(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("one", "two"):
        overrides = [o for o in tiny_overrides(colour_table, tmp_path / name) if not o.startswith("logger=")]
        train(compose("train", *overrides, "logger=wandb", "trainer.max_epochs=1"))
    runs = {
        name: list((tmp_path / name / "wandb").glob("offline-run-*/run-*.wandb")) for name in ("one", "two")
    }
    assert [len(files) for files in runs.values()] == [1, 1]
    assert runs["one"][0].name != runs["two"][0].name


def test_a_training_that_fails_ends_its_run_of_wandb(
    colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    failing = ["_target_=lightning.pytorch.callbacks.EarlyStopping", "monitor=nothing"]
    overrides = [f"+callbacks.stop.{setting}" for setting in failing]
    with pytest.raises(RuntimeError, match="nothing"):
        train(compose("train", *tiny_overrides(colour_table, tmp_path / "run"), "logger=wandb", *overrides))
    [file] = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert finished_run(file).exit_codes == [1]
