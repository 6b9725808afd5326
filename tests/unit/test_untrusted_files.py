"""Weights, checkpoints and run directories from anywhere: none of them runs anything, each refusal is one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_model
from lightning.pytorch.callbacks import ModelCheckpoint

from efficap.commands.init_from import with_model_of
from efficap.commands.run_dir import RunDirectory
from efficap.errors import InputError
from efficap.models.build import build_model, load_pretrained_parts
from efficap.training.callbacks import BestCheckpoint


class Program:
    """What a pickle can make of its reading."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def load_encoder(file: Path) -> None:
    model = tiny_model(encoder__pretrained=True, encoder__weights_file=str(file))
    load_pretrained_parts(build_model(model, 97), model)


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


def test_a_checkpoint_that_is_a_program_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {"a": Program(tmp_path / "ran")}}, tmp_path / "best.ckpt")
    monkeypatch.setattr(
        ModelCheckpoint, "on_validation_end", lambda *_: None
    )  # which writes it in a training
    callback = BestCheckpoint(tmp_path)
    callback.best_model_path, callback.best_model_score = str(tmp_path / "best.ckpt"), torch.tensor(1.0)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
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
    with pytest.raises(InputError, match=r"data._target_=pathlib.Path.touch is none of efficap"):
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
