"""A run directory: what training writes and what evaluation and captioning read, nothing else needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import get_class

from efficap.data.csv import CSVDataModule
from efficap.data.demo.module import DemoDataModule
from efficap.data.mix import MixedDataModule
from efficap.data.module import CaptionData
from efficap.data.webdataset import WebDatasetDataModule
from efficap.errors import InputError
from efficap.models.captioner import Captioner
from efficap.models.pretrained import load_captioner
from efficap.tokenizer import CaptionTokenizer

CONFIG_FILE = "config.yaml"
TOKENIZER_DIR = "tokenizer"
_KEYS = {"name", "model", "data", "decoding"}

# A run's configuration may come from anywhere, so its _target_ picks one of these and is never imported.
_DATA_MODULES: dict[str, type[Any]] = {
    f"{module.__module__}.{module.__qualname__}": module
    for module in (CSVDataModule, DemoDataModule, WebDatasetDataModule, MixedDataModule)
}


class RunDirectory:
    """Reads a run directory.

    Attributes:
        path: the directory, links resolved.
        config: the resolved configuration of its training, plain values.

    Raises:
        InputError: it does not exist or holds no configuration.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        file = self.path / CONFIG_FILE
        if not file.is_file():
            reason = "holds no config.yaml" if self.path.is_dir() else "does not exist"
            raise InputError(f"run={path} {reason}; give a run directory, such as outputs/latest")
        try:
            self.config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise InputError(f"{file} is no YAML: {' '.join(str(error).split())}") from error
        if not isinstance(self.config, dict) or not self.config.keys() >= _KEYS:
            raise InputError(f"{file} is no run's configuration: it lacks one of {', '.join(sorted(_KEYS))}")

    def tokenizer(self) -> CaptionTokenizer:
        return CaptionTokenizer.load(self.path / TOKENIZER_DIR)

    def captioner(self, tokenizer: CaptionTokenizer, device: torch.device) -> Captioner:
        """The trained model on `device`, in evaluation mode."""
        return load_captioner(self.path, self.config["model"], tokenizer.vocab_size).to(device)

    def data(self, changes: dict[str, Any]) -> CaptionData:
        """The run's data module with some of its settings changed.

        Raises:
            InputError: a data module that is not this project's.
        """
        try:
            return self._built(_merged(self.config["data"], changes), changes)
        except TypeError as error:
            raise InputError(f"{self.path / CONFIG_FILE}: data does not fit its module: {error}") from error

    def _built(self, settings: dict[str, Any], changes: dict[str, Any]) -> CaptionData:
        """The module that `settings` name, and in a mixture those of its sources first."""
        settings = dict(settings)
        target = settings.pop("_target_", None)
        if "_target_" in changes:  # the user's own words, unlike the file's
            module = get_class(target)
        elif target in _DATA_MODULES:
            module = _DATA_MODULES[target]
        else:
            raise InputError(
                f"{self.path / CONFIG_FILE}: data._target_={target} is none of {', '.join(_DATA_MODULES)}; "
                "a run's own code is not imported; +data._target_=… on the command line is"
            )
        if module is MixedDataModule:
            below = changes.get("sources", {})
            sources = settings["sources"].items()
            settings["sources"] = {name: self._built(source, below.get(name, {})) for name, source in sources}
        return module(**settings)


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def write_run(path: Path, config: dict[str, Any], tokenizer: CaptionTokenizer) -> None:
    """Write a run's configuration and tokenizer, and point outputs/latest to it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).write_text(
        yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    tokenizer.save(path / TOKENIZER_DIR)
    _point_latest(path)


def _point_latest(path: Path) -> None:
    outputs = next((parent for parent in path.resolve().parents if parent.name == "outputs"), None)
    if outputs is None:
        return
    temporary = outputs / f".latest.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.resolve().relative_to(outputs), target_is_directory=True)
    os.replace(temporary, outputs / "latest")


def choose_device(accelerator: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``gpu``.

    Raises:
        InputError: a GPU was asked for and there is none, or an unknown word.
    """
    check_accelerator("accelerator", accelerator)
    if accelerator == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    mps = torch.backends.mps.is_available()
    return torch.device("mps" if mps else "cpu")


def check_accelerator(setting: str, accelerator: str) -> None:
    """Raises InputError where `accelerator` is unknown, or a GPU that is not there."""
    known = ("auto", "cpu", "gpu")
    if accelerator not in known:
        raise InputError(f"{setting}={accelerator} must be one of {', '.join(known)}")
    if accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise InputError(
            f"{setting}=gpu, but torch {torch.__version__} sees no GPU here; use {setting}=cpu or auto"
        )
