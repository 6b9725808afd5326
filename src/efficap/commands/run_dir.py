"""A run directory: what training writes and what evaluation and captioning read, nothing else needed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import get_class

from efficap.commands.kinds import check_form
from efficap.commands.placement import choose_device, choose_precision
from efficap.commands.saved_parts import DATA_MODULES
from efficap.commands.schema import RUN, check_data
from efficap.data.caption_data import CaptionData
from efficap.data.mix import MixedDataModule
from efficap.errors import InputError
from efficap.files import replacing
from efficap.models.build import load_model
from efficap.models.captioner import CaptionModel
from efficap.models.fold import fold_norms
from efficap.models.pretrained.onnx_runtime import OnnxCaptioner
from efficap.models.weights import WEIGHTS_FILE
from efficap.tokenizer import CaptionTokenizer
from efficap.yaml_files import read_yaml

CONFIG_FILE = "config.yaml"
TOKENIZER_DIR = "tokenizer"
LATEST = "latest"  # a link below outputs/
_PLACES = ("table", "image_dir", "shards")  # null in a published captioner


class RunDirectory:
    """Reads a run directory.

    Args:
        path: the directory.
        setting: that names it, for messages.

    Attributes:
        path: the directory, links resolved.
        config: the resolved configuration of its training, plain values.
        export: of an ONNX export, whose graphs lie in place of the weights: what it is; empty for a run.

    Raises:
        InputError: it does not exist or holds no configuration.
    """

    def __init__(self, path: str | Path, setting: str = "run") -> None:
        self.path = Path(path).expanduser().resolve()
        file = self.path / CONFIG_FILE
        if not file.is_file():
            reason = "holds no config.yaml" if self.path.is_dir() else "does not exist"
            raise InputError(f"{setting}={path} {reason}; give a run directory, such as outputs/latest")
        self.config: dict[str, Any] = read_yaml(file)
        if not isinstance(self.config, dict) or not self.config.keys() >= RUN.keys():
            raise InputError(f"{file} is no run's configuration: it lacks one of {', '.join(sorted(RUN))}")
        try:
            check_form(self.config, RUN)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        self.config["name"] = str(self.config["name"])  # earlier versions took a number
        self.export: dict[str, Any] = self.config.get("export") or {}
        if not isinstance(self.export, dict):
            raise InputError(f"{file}: export={self.export} must be a mapping, or left out")

    def tokenizer(self) -> CaptionTokenizer:
        return CaptionTokenizer.load(self.path / TOKENIZER_DIR)

    def weights_digest(self) -> str:
        """SHA-256 of the weights, or of an export's graphs; of nothing where there are none yet.

        Raises:
            InputError: they cannot be read.
        """
        digest = hashlib.sha256()
        for file in sorted(self.path.glob("*.onnx")) if self.export else [self.path / WEIGHTS_FILE]:
            try:
                with file.open("rb") as opened:
                    digest.update(hashlib.file_digest(opened, "sha256").digest())
            except FileNotFoundError:
                continue
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    def placement(self, accelerator: str, precision: str | None) -> tuple[torch.device, torch.dtype]:
        """The device and the dtype of the weights that the settings of these names ask for.

        Raises:
            InputError: there is no such thing, or none for an ONNX export, which is computed on the CPU as it is.
        """
        device = choose_device(accelerator)
        if not self.export:
            return device, choose_precision(precision, device)
        own = "int8" if self.export.get("int8") else "float32"
        if accelerator == "gpu":
            raise InputError(
                f"accelerator=gpu: {self.path} is an ONNX export, computed on the CPU; leave it out"
            )
        if precision not in (None, own):
            raise InputError(f"precision={precision}: {self.path} is an ONNX export in {own}; leave it out")
        return torch.device("cpu"), getattr(torch, own)

    def captioner(
        self,
        tokenizer: CaptionTokenizer,
        device: torch.device,
        precision: torch.dtype = torch.float32,
        *,
        compile: bool = False,
        packed: bool = False,
    ) -> CaptionModel | OnnxCaptioner:
        """The trained model on `device`, in evaluation mode, its weights in `precision`; or an export's, as it is.

        Args:
            compile: whether it decodes through torch.compile.
            packed: whether its weights are laid out for captions alone; see `fold_norms` and, where it is not compiled,
                `CaptionModel.pack_weights`.

        Raises:
            InputError: an export is to be compiled, which is no model of torch's.
        """
        if self.export:
            if compile:
                raise InputError(
                    f"compile=true: {self.path} is an ONNX export, compiled already; leave it out"
                )
            n_positions = self.config["model"]["decoder"]["n_positions"]
            return OnnxCaptioner(self.path, n_positions=n_positions, vocab_size=tokenizer.vocab_size)
        captioner = load_model(self.path, self.config["model"], tokenizer.vocab_size)
        if packed:
            fold_norms(captioner.encoder.backbone)  # before the weights are rounded, which then loses less
        captioner.to(device, precision)
        if compile:
            captioner.compile_decoding()
        elif packed:
            captioner.pack_weights()
        elif precision != torch.float32:
            captioner.decoder.keep_head()
        return captioner

    def decoding(self, changes: dict[str, Any]) -> dict[str, Any]:
        """The settings of a decoding: those that the run validated with, some of them changed, or another method's.

        Args:
            changes: all settings of a method, its name among them, or some of the run's own.
        """
        return changes if "method" in changes else {**self.config["decoding"], **changes}

    def data(self, changes: dict[str, Any], settings: dict[str, Any] | None = None) -> CaptionData:
        """The run's data module with some of its settings changed, or the one that other `settings` name.

        Raises:
            InputError: a data module that is not this project's.
        """
        merged = _merged(settings or self.config["data"], changes)
        if "_target_" not in changes:  # a module of the user's own knows its settings
            check_data(merged)
        try:
            return self._built(merged, changes)
        except TypeError as error:
            raise InputError(f"{self.path / CONFIG_FILE}: data does not fit its module: {error}") from error

    def _built(self, settings: dict[str, Any], changes: dict[str, Any], where: str = "data") -> CaptionData:
        """The module that `settings` name, and in a mixture those of its sources first."""
        settings = dict(settings)
        target = settings.pop("_target_", None)
        if "_target_" in changes:  # the user's own words, unlike the file's
            module = _imported(target)
        elif target in DATA_MODULES:
            module = DATA_MODULES[target]
        else:
            raise InputError(
                f"{self.path / CONFIG_FILE}: {where}._target_={target} is none of {', '.join(DATA_MODULES)}; "
                f"a run's own code is not imported; +{where}._target_=… on the command line is"
            )
        for key in _PLACES:
            if key in settings and settings[key] is None:
                raise InputError(f"{where}.{key} is not known here; add +{where}.{key}=PATH")
        if module is MixedDataModule:
            below = changes.get("sources", {})
            sources = settings.get("sources", {}).items()
            settings["sources"] = {
                name: self._built(source, below.get(name, {}), f"{where}.sources.{name}")
                for name, source in sources
            }
        return module(**settings)


def _imported(target: object) -> Any:
    """The data module of the user's own that the command line names."""
    try:
        module = get_class(str(target))
    except Exception as error:  # of many kinds: what is no class, what is blocked, what its import does
        raise InputError(f"data._target_={target} cannot be imported: {error}") from error
    if not issubclass(module, CaptionData):
        raise InputError(f"data._target_={target} is no data module: none of CaptionData's")
    return module


def _merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(settings)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def write_run(path: Path, config: dict[str, Any], tokenizer: CaptionTokenizer) -> None:
    """Write a run's configuration and tokenizer, each whole or not at all, and point outputs/latest to it."""
    path.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    with replacing(path / CONFIG_FILE) as file:
        file.write(text.encode())
    temporary = path / f".{TOKENIZER_DIR}.{os.getpid()}.tmp"
    tokenizer.save(temporary)
    (path / TOKENIZER_DIR).mkdir(exist_ok=True)
    for part in (path / TOKENIZER_DIR).iterdir():
        if not (temporary / part.name).exists():
            part.unlink()  # of a training that ended before its first checkpoint
    for part in temporary.iterdir():
        os.replace(part, path / TOKENIZER_DIR / part.name)
    temporary.rmdir()
    _point_latest(path)


def _point_latest(path: Path) -> None:
    outputs = next((parent for parent in path.resolve().parents if parent.name == "outputs"), None)
    if outputs is None:
        return
    temporary = outputs / f".{LATEST}.{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.resolve().relative_to(outputs), target_is_directory=True)
        os.replace(temporary, outputs / LATEST)
    except OSError as error:  # another user's folder, a disk without links, or a folder of that name
        with contextlib.suppress(OSError):
            temporary.unlink()
        print(f"{outputs / LATEST} cannot lead to {path}: {error.strerror}", file=sys.stderr)
