"""Weights, checkpoints and run directories from anywhere: none of them runs anything, each refusal is one line."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import compose, going_on, tiny_model, tiny_overrides
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file

from efficap.commands.entry import _one_line
from efficap.commands.init_from import with_model_of
from efficap.commands.loggers import _wandb_run
from efficap.commands.resume import with_settings_of
from efficap.commands.run_dir import RunDirectory
from efficap.data.pictures import Picture, PictureError
from efficap.data.table import read_table
from efficap.errors import InputError
from efficap.evaluation.gallery import load_picture
from efficap.models.build import build_model, load_first_weights, load_model
from efficap.models.weights import save_weights
from efficap.tokenizer import CaptionTokenizer
from efficap.training.callbacks import BestCheckpoint
from efficap.training.checkpoints import Checkpoint
from efficap.yaml_files import read_yaml

CALLBACKS, WANDB = "lightning.pytorch.callbacks", "lightning.pytorch.loggers.WandbLogger"


class Program:
    """What a pickle can make of its reading."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def bomb() -> str:
    """Lists of lists, each twice the one before: 1 kB that means 2 ** 30 values."""
    names = "cdefghijklmnopqrstuvwxyzABCDEFGH"
    return "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise(names))


def load_encoder(file: Path) -> None:
    model = tiny_model(encoder__pretrained=True, encoder__weights_file=str(file))
    load_first_weights(build_model(model, 97), model)


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))])
@pytest.mark.parametrize("name", ["encoder.pth", "encoder.safetensors"])
def test_an_encoder_that_is_a_program_is_refused_and_not_run(
    tmp_path: Path, write: Callable[[Any, Path], Any], name: str
) -> None:
    write({"conv_stem.weight": Program(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(InputError, match=rf"model.encoder.weights_file=.*{name}: cannot load") as caught:
        load_encoder(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_an_encoder_whose_header_is_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"model.encoder.weights_file=.*: cannot load") as caught:
        load_encoder(tmp_path / "encoder.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "encoder.backbone."])
def test_an_encoder_file_of_another_model_is_refused_and_not_loaded_in_part(
    tmp_path: Path, prefix: str
) -> None:
    import timm

    name = "test_efficientnet" if prefix else "test_efficientnet_gn"
    weights = timm.create_model(name).state_dict()
    save_file({f"{prefix}{key}": value for key, value in weights.items()}, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError,
        match=r"weights_file=\S+: its weights are not those of test_efficientnet, or have other names",
    ):
        load_encoder(tmp_path / "w.safetensors")


def test_an_encoder_file_with_another_classifier_is_loaded(tmp_path: Path) -> None:
    import timm

    weights = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    save_file(weights, tmp_path / "w.safetensors")
    load_encoder(tmp_path / "w.safetensors")


def test_a_picture_of_endless_scans_is_refused(tmp_path: Path) -> None:
    """A progressive JPEG of a few kilobytes whose decoding would take minutes."""
    data = io.BytesIO()
    Image.new("RGB", (16, 16)).save(data, "JPEG", progressive=True)
    scan = data.getvalue()[data.getvalue().index(b"\xff\xda") : -2]
    bomb = data.getvalue()[:-2] + 2000 * scan + data.getvalue()[-2:]
    with pytest.raises(PictureError, match=r"too large: a JPEG of [\d,]+ scans, the limit is 1,000"):
        Picture(bomb)
    Picture(data.getvalue()).pixels()


def test_a_checkpoint_that_is_a_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {"a": Program(tmp_path / "ran")}}, tmp_path / "best.ckpt")

    def name_it(callback: ModelCheckpoint, *_: object) -> None:  # which in a training it has written
        callback.best_model_path, callback.best_model_score = str(tmp_path / "best.ckpt"), torch.tensor(1.0)

    monkeypatch.setattr(ModelCheckpoint, "on_validation_end", name_it)
    callback = BestCheckpoint(tmp_path)
    with pytest.warns(UserWarning, match="Weights only load failed"):
        callback.on_validation_end(SimpleNamespace(is_global_zero=True), SimpleNamespace())  # type: ignore[arg-type]
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model.safetensors").exists()


# A run's configuration


def run_with(folder: Path, **changes: Any) -> RunDirectory:
    config = {
        "name": "theirs",
        "model": tiny_model(),
        "data": {},
        "decoding": {"method": "greedy"},
        **changes,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return RunDirectory(folder)


def test_a_mixtures_source_imports_nothing(tmp_path: Path) -> None:
    source = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "ran")}
    data = {"_target_": "efficap.data.mix.MixedDataModule", "sources": {"one": source}}
    with pytest.raises(InputError, match=r"data.sources.one._target_=pathlib.Path.touch is none of efficap"):
        run_with(tmp_path, data=data).data({})
    assert not (tmp_path / "ran").exists()


def test_a_configuration_that_builds_python_objects_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        f"name: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/ran']"
    )
    with pytest.raises(InputError, match=r"config.yaml is no YAML"):
        RunDirectory(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_training_that_starts_from_a_run_takes_nothing_of_it_that_is_instantiated(tmp_path: Path) -> None:
    theirs = {"_target_": "pathlib.Path.touch", "self": str(tmp_path / "ran")}
    parts = {"callbacks": {"bad": theirs}, "logger": theirs, "data": theirs}
    run = run_with(tmp_path, **parts, model={**tiny_model(), "part": theirs})
    ours: dict[str, Any] = {
        "model": tiny_model(),
        "optimizer": {"lr": tiny_model()["lr"]},
        "data": {},
        "callbacks": {},
        "logger": None,
        "init_from": str(tmp_path),
    }
    merged = with_model_of(run, ours)
    for key in ours.keys() - {"model", "optimizer", "init_from"}:  # these three are built in Python
        assert merged[key] is ours[key]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"data": {"_target_": "os.system", "command": "touch {ran}"}},
            r"data\._target_=os.system is none of",
        ),
        (
            {"callbacks": {"bad": {"_target_": "pathlib.Path.touch", "self": "{ran}"}}},
            r"callbacks\.bad\._target_=pathlib.Path.touch is none of lightning.*\+\+callbacks\.bad\._target_=",
        ),
        (
            {"callbacks": {"lr": {"_target_": f"{CALLBACKS}.Timer", "duration": {"_target_": "os.getcwd"}}}},
            r"callbacks\.lr\.duration\._target_=os.getcwd is none of",
        ),
        (
            {"logger": {"_target_": "builtins.eval", "expression": "1"}},
            r"logger\._target_=builtins.eval is none of",
        ),
        (
            {"logger": {"_target_": WANDB, "settings": {"base_url": "http://elsewhere.example"}}},
            r"logger\.settings\.base_url is not taken from a run",
        ),
        (
            {"logger": {"_target_": WANDB, "name": "${oc.env:SECRET}"}},
            r"logger\.name=\$\{oc\.env:SECRET\} is to be",
        ),
        (
            {"stages": {"one": {"data": {"_target_": "os.system", "command": "true"}}}},
            r"stages\.one\.data\._target_=os.system is none of",
        ),
    ],
)
def test_a_training_that_goes_on_with_a_run_builds_nothing_that_the_run_names(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    run = run_with(tmp_path, **changes)
    ours = {"resume": str(tmp_path), "data": {}, "callbacks": {}, "logger": None, "stages": None}
    with pytest.raises(InputError, match=reason):
        with_settings_of(run, ours)


def test_the_settings_that_every_run_has_may_be_gone_on_with(tmp_path: Path) -> None:
    overrides = [o for o in tiny_overrides(tmp_path, tmp_path / "run") if o != "logger=csv"]
    config = compose("train", *overrides, "+logger.tags=[mine]")
    config["model"] = tiny_model()
    run = run_with(tmp_path, **{**config, "name": 2024})  # as earlier versions took it
    settings = with_settings_of(run, going_on(tmp_path))
    assert settings["name"] == "2024"
    assert settings["callbacks"] == config["callbacks"]
    assert settings["logger"] == {**config["logger"], "save_dir": str(tmp_path)}, "wherever it was trained"


def test_the_note_of_a_wandb_run_gives_the_logger_no_other_argument(tmp_path: Path) -> None:
    kept = {"id": "abc", "name": "n", "group": None, "tags": ["t"]}
    (tmp_path / "wandb.json").write_text(json.dumps({**kept, "_target_": "os.system", "command": "true"}))
    assert _wandb_run(tmp_path) == {**kept, "resume": "allow"}
    (tmp_path / "wandb.json").write_text(json.dumps({**kept, "id": {"_target_": "os.getcwd"}}))
    with pytest.raises(InputError, match=r"wandb\.json is damaged"):
        _wandb_run(tmp_path)


def test_an_environment_variable_is_not_looked_up_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter22")
    run = run_with(tmp_path, name="${oc.env:SECRET}")
    assert run.config["name"] == "${oc.env:SECRET}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + bomb(), "more than 100,000 values"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ("x: " + "y" * (1 << 20), "more than 1,048,576 bytes"),
        ("when: 2020-01-01", "is a date; put it in quotes"),
        ("n: " + "9" * 5000, "no YAML of plain values"),
        ("? [a]\n: b", "no YAML of plain values"),
    ],
)
def test_yaml_that_would_fill_the_memory_or_is_no_plain_value_is_refused(
    text: str, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=reason) as caught:
        read_yaml(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_a_list_that_stands_in_several_places_is_plain_yaml(tmp_path: Path) -> None:
    shared = [0.6, 1.0]  # as the stages of a training have
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"a": shared, "b": {"c": shared}}))
    assert "*id001" in (tmp_path / "config.yaml").read_text()
    assert read_yaml(tmp_path / "config.yaml") == {"a": shared, "b": {"c": shared}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"decoder__n_embd": "wide"}, r"config.yaml: model.decoder.n_embd=wide must be a whole number"),
        ({"image_size": 10**9}, r"model.image_size=1000000000 must be a whole number from 1 to 4096"),
        ({"encoder__crop_pct": 0}, r"model.encoder.crop_pct=0 must be a number from 0.01 to 1"),
        ({"bridge": None}, r"model.bridge=null must be a mapping of settings"),
        (
            {"encoder__mean": [0.5, float("nan"), 0.5]},
            r"model.encoder.mean=.* must be a list of three numbers",
        ),
    ],
)
def test_a_runs_model_of_another_form_is_named(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        run_with(tmp_path, model=tiny_model(**changes))


def test_a_model_larger_than_its_weights_takes_no_memory(tmp_path: Path) -> None:
    save_weights(build_model(tiny_model(), 97).state_dict(), tmp_path)
    huge = tiny_model(decoder__n_embd=60_000, decoder__n_layer=1000)
    with pytest.raises(
        InputError, match=r"does not fit .*: it has \d+,\d+ values, fewer than the 43,\d+,\d+,\d+,"
    ):
        load_model(tmp_path, huge, 97)


def test_a_tokenizer_with_an_id_beyond_all_measure_is_refused(tmp_path: Path) -> None:
    CaptionTokenizer.learn(["a dog"], 300).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["far"] = 4_000_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="the tokenizer has the id 4,000,000,000; they must be below"):
        CaptionTokenizer.load(tmp_path)


def test_a_checkpoint_that_is_a_program_is_not_gone_on_with(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "callbacks": Program(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt is damaged, or holds more than plain values") as caught:
        Checkpoint.read(tmp_path / "last.ckpt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


KEPT = {"RunMetrics": {"stage": {}}, "ResumePoint": {"validation_due": False}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"callbacks": []}, "is no checkpoint of a training: it has no callbacks"),
        ({"state_dict": []}, "is no checkpoint of a training: it has no state_dict"),
        ({"callbacks": {}}, "is no checkpoint of efficap: it has no RunMetrics"),
        ({"callbacks": {"RunMetrics": {}}}, "is no checkpoint of efficap: it has no ResumePoint"),
        ({"callbacks": {**KEPT, "ResumePoint": {}}}, "by another version: 'validation_due'"),
        (
            {"callbacks": {**KEPT, "RunMetrics": {"stage": {"far": 1}}}},
            "by another version: .* 'far'",
        ),
        ({"epoch": "third"}, "by another version: .* 'third'"),
        ({}, "by another version: 'TrainerData'"),
    ],
)
def test_a_checkpoint_that_lacks_what_is_needed_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    usual: dict[str, Any] = {"state_dict": {}, "loops": {}, "optimizer_states": [], "lr_schedulers": []}
    usual |= {"callbacks": KEPT, "epoch": 0, "global_step": 0}
    torch.save({**usual, **changes}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=message) as caught:
        Checkpoint.read(tmp_path / "last.ckpt")
    assert "\n" not in str(caught.value)


def test_the_best_weights_that_a_checkpoint_names_elsewhere_are_neither_read_nor_removed(
    tmp_path: Path,
) -> None:
    callback = BestCheckpoint(tmp_path)
    state = callback.state_dict()
    inside = str(tmp_path / "checkpoints" / "best.ckpt")
    for path in ("/etc/passwd", str(tmp_path / "checkpoints/../../x.ckpt"), "s3://bucket/x.ckpt"):
        named = {"best_model_path": path, "last_model_path": path, "kth_best_model_path": path}
        callback.load_state_dict(
            {**state, **named, "best_model_score": 2.0, "best_k_models": {path: 1.0, inside: 2.0}}
        )
        assert {callback.best_model_path, callback.kth_best_model_path} == {inside}
        assert callback.best_k_models == {inside: 2.0}
        assert callback.last_model_path == ""


def test_what_a_file_says_to_the_terminal_is_shown_and_not_done() -> None:
    assert _one_line(InputError("name=\x1b]0;mine\x07\nx\ud800é"), "eval") == r"name=\x1b]0;mine\x07 x\ud800é"


# Pictures


@pytest.mark.parametrize("form", ["EPS", "ICO", "PCX"])
def test_a_picture_of_a_kind_that_starts_programs_or_that_nobody_uses_is_not_opened(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", form)
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program is started")
    )
    with pytest.raises(PictureError, match="no picture: begins with"):
        Picture(tmp_path / "x.jpg").pixels()
    with pytest.raises(OSError, match="cannot identify"):
        load_picture(tmp_path / "x.jpg", 64)


def test_a_picture_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(PictureError, match="unreadable: no regular file"):
        Picture(tmp_path / "x.jpg")


def test_a_file_larger_than_its_pixels_can_be_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(1 << 40)  # takes no place
    with pytest.raises(PictureError, match="1,099,511,627,776 bytes, more than a picture of"):
        Picture(tmp_path / "x.jpg")


def test_the_pages_thumbnails_are_bounded_in_pixels_before_they_are_decoded(tmp_path: Path) -> None:
    Image.new("1", (15_000, 15_000)).save(tmp_path / "x.png")  # below twice Pillow's own limit
    with pytest.raises(OSError, match=r"225000000 pixels.* the limit is 178,956,970"):
        load_picture(tmp_path / "x.png", 64)


@pytest.mark.parametrize("name", ["link.jpg", "folder/secret.jpg"])
def test_a_link_out_of_the_pictures_folder_is_not_followed_unless_that_is_asked_for(
    name: str, tmp_path: Path
) -> None:
    images, outside = tmp_path / "images", tmp_path / "outside"
    images.mkdir()
    outside.mkdir()
    Image.new("RGB", (16, 16)).save(outside / "secret.jpg")
    Image.new("RGB", (16, 16)).save(images / "own.jpg")
    (images / "link.jpg").symlink_to(outside / "secret.jpg")
    (images / "folder").symlink_to(outside)
    (images / "same.jpg").symlink_to("own.jpg")
    columns = {"image_column": "file_name", "caption_column": "caption", "split_column": "split"}
    table = tmp_path / "t.csv"
    table.write_text("file_name,caption,split\nsame.jpg,a,train\nown.jpg,a,train\n")
    assert len(read_table(table, images, **columns)[0]["train"]) == 2, "links within the folder"
    table.write_text(f"file_name,caption,split\n{name},a,train\n")
    with pytest.raises(
        InputError, match=f"{name} is a link out of data.image_dir=.*data.allow_absolute=true"
    ):
        read_table(table, images, **columns)
    assert len(read_table(table, images, **columns, allow_absolute=True)[0]["train"]) == 1


def test_what_a_process_left_that_was_killed_as_it_wrote_weights_goes(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.0123abcd.tmp").write_bytes(b"half")
    save_weights({"a": torch.zeros(2)}, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
