"""The best weights: kept through full disks, and found again where the run has been moved to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from efficap.training.callbacks import BestCheckpoint

TRAINER: Any = SimpleNamespace(is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None))


class Validations:
    """Stands for Lightning, which writes best.ckpt after a validation.

    Attributes:
        score: of the next one.
        disk_is_full: whether best.ckpt cannot be written.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.score, self.disk_is_full = 0.0, False
        patch.setattr(ModelCheckpoint, "on_validation_end", lambda callback, *_: self._write(callback))

    def of(self, callback: BestCheckpoint, score: float) -> None:
        self.score = score
        callback.on_validation_end(TRAINER, TRAINER)

    def _write(self, callback: BestCheckpoint) -> None:
        score = self.score
        callback.best_model_score = torch.tensor(score)
        callback.best_model_path = f"{callback.dirpath}/best.ckpt"
        callback.best_k_models = {callback.best_model_path: callback.best_model_score}
        if self.disk_is_full:
            raise OSError("No space left on device")
        weights = {"captioner.weight": torch.tensor([score])}
        Path(str(callback.dirpath)).mkdir(exist_ok=True)
        torch.save({"state_dict": weights}, callback.best_model_path)


@pytest.fixture
def validations(monkeypatch: pytest.MonkeyPatch) -> Validations:
    return Validations(monkeypatch)


def test_weights_that_a_full_disk_did_not_take_are_exported_after_the_next_validation(
    tmp_path: Path, validations: Validations, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = BestCheckpoint(tmp_path)
    with monkeypatch.context() as patch:

        def refuse(*_: object) -> None:
            raise OSError("No space left on device")

        patch.setattr(BestCheckpoint, "_export", refuse)
        with pytest.warns(UserWarning, match="the best weights could not be written"):
            validations.of(best, 0.3)
    validations.disk_is_full = True
    with pytest.warns(UserWarning, match="the best weights could not be kept"):
        validations.of(best, 0.4)
    assert best.best_model_score == torch.tensor(0.3)
    assert load_file(tmp_path / "model.safetensors")["weight"] == torch.tensor([0.3])


def test_a_training_that_goes_on_exports_what_was_not(
    tmp_path: Path, validations: Validations, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = BestCheckpoint(tmp_path), BestCheckpoint(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(BestCheckpoint, "_export_best", lambda _: None)
        validations.of(before, 0.3)
    after.load_state_dict(before.state_dict())
    monkeypatch.setattr(ModelCheckpoint, "on_train_end", lambda *_: None)
    after.on_train_end(TRAINER, TRAINER)
    assert load_file(tmp_path / "model.safetensors")["weight"] == torch.tensor([0.3])


def test_a_run_that_was_moved_knows_its_best_score(tmp_path: Path, validations: Validations) -> None:
    before, moved = BestCheckpoint(tmp_path / "here"), BestCheckpoint(tmp_path / "there")
    (tmp_path / "here").mkdir()
    validations.of(before, 0.3)
    moved.load_state_dict(before.state_dict())
    assert moved.best_model_score == torch.tensor(0.3)
    assert moved.best_model_path == str(tmp_path / "there" / "checkpoints" / "best.ckpt")
    assert moved.best_k_models == {moved.best_model_path: torch.tensor(0.3)}
    assert moved.kth_best_model_path == moved.best_model_path
