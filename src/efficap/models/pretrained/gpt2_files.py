"""The forms in which GPT-2s are published, read into one: transformers' names and layout.

transformers' own: safetensors or PyTorch's, in one file or in shards, and TensorFlow's in HDF5. OpenAI's: the
TensorFlow checkpoint of https://github.com/openai/gpt-2 with its hparams.json.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from efficap.errors import InputError
from efficap.hub import pretrained_files
from efficap.models.pretrained.hdf5 import read_hdf5
from efficap.models.pretrained.tf_checkpoint import read_tf_checkpoint
from efficap.models.weights import WEIGHTS_FILE, read_weights

SETTING = "model.decoder.name"
WAY_OUT = (
    "model.decoder.name=DIR takes a directory with config.json, the weights and the tokenizer's files; "
    "model.pretrained=false model.tokenizer.name=null starts from nothing"
)
_USUAL = ("config.json", WEIGHTS_FILE, "tokenizer.json", "tokenizer_config.json")
# The file that a form is known by, the first one first, and what belongs to it.
_FORMS = {
    WEIGHTS_FILE: (),
    f"{WEIGHTS_FILE}.index.json": ("model-*.safetensors",),
    "pytorch_model.bin": (),
    "pytorch_model.bin.index.json": ("pytorch_model-*.bin",),
    "tf_model.h5": (),
    "*.index": ("checkpoint", "*.data-*-of-*"),
}


def read_gpt2_config(name: str) -> dict[str, Any]:
    """The config.json of a checkpoint, or OpenAI's hparams.json under the names of a config.json.

    Raises:
        InputError: it cannot be had or is no JSON object.
    """

    def choose(names: Sequence[str]) -> list[str]:
        found = [file for file in ("config.json", "hparams.json") if file in names]
        if not found:
            raise InputError(f"{SETTING}={name} has neither config.json nor hparams.json; {WAY_OUT}")
        return found[:1]

    directory = pretrained_files(SETTING, name, choose, _USUAL, WAY_OUT)
    [file] = [directory / chosen for chosen in choose([file.name for file in directory.iterdir()])]
    config = _json(file)
    if file.name == "hparams.json":
        config = {**config, "n_positions": config.get("n_ctx")}
    return config


def read_gpt2_weights(name: str) -> dict[str, Tensor]:
    """The weights of a checkpoint in the first of the known forms that it has, in the precision stored.

    Raises:
        InputError: they cannot be had, are damaged, or hold code.
    """

    def choose(names: Sequence[str]) -> list[str]:
        form = _form(name, names)
        return [file for pattern in (form, *_FORMS[form]) for file in fnmatch.filter(names, pattern)]

    directory = pretrained_files(SETTING, name, choose, _USUAL, WAY_OUT)
    form = _form(name, [file.name for file in directory.iterdir()])
    file = directory / form
    if form.endswith(".index.json"):
        return _read_shards(file)
    if form.endswith(".h5"):
        return _renamed(read_hdf5(file), _from_keras)
    if form == "*.index":
        return _renamed(read_tf_checkpoint(_prefix(directory)), _from_openai)
    return _read_one(file)


def _form(name: str, names: Sequence[str]) -> str:
    form = next((form for form in _FORMS if fnmatch.filter(names, form)), None)
    if form is None:
        known = ", ".join(list(_FORMS)[:-1])
        raise InputError(f"{SETTING}={name} has none of {known} and no TensorFlow checkpoint; {WAY_OUT}")
    return form


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object")
    return content


def _read_shards(index: Path) -> dict[str, Tensor]:
    placed = _json(index).get("weight_map")
    shards = sorted({str(shard) for shard in placed.values()}) if isinstance(placed, dict) else []
    weights: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:  # the index may come from anywhere
            raise InputError(f"{index} names {shard!r}, which is outside its directory")
        weights |= _read_one(index.parent / shard)
    return weights


def _read_one(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return read_weights(file)
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    try:
        # A pickle may be a program; with weights_only, torch runs none of it.
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError and more
        raise InputError(
            f"{file} is damaged, or holds more than weights and is not trusted; give {WEIGHTS_FILE} in its place"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{file} holds other things than weights by name")
    return dict(weights)


def _prefix(directory: Path) -> Path:
    """Where a TensorFlow checkpoint's files begin: the one that ``checkpoint`` names, or the only one."""
    note = directory / "checkpoint"
    if note.is_file():
        said = re.search(r'^model_checkpoint_path:\s*"(.+)"', note.read_text(errors="replace"), re.MULTILINE)
        if said:
            return directory / Path(said[1]).name  # the path is that of the machine that wrote it
    found = sorted(directory.glob("*.index"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(
            f"{directory} has several checkpoints ({names}) and no file 'checkpoint' that names one"
        )
    return found[0].with_suffix("")


def _renamed(arrays: Mapping[str, NDArray[Any]], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Arrays as tensors under transformers' names, without the axis of length 1 that TensorFlow's layers have.

    OpenAI's matrices are (1, in, out), those of transformers in TensorFlow (in, out) with biases (1, out).
    """
    weights = {}
    for key, array in arrays.items():
        name = rename(key)
        if array.ndim == (2 if name.endswith(".bias") else 3):
            array = array.reshape(array.shape[1:]) if array.shape[0] == 1 else array
        weights[name] = torch.from_numpy(np.asarray(array))
    return weights


def _from_keras(path: str) -> str:
    """``…/transformer/h_._0/ln_1/gamma:0`` is ``h.0.ln_1.weight``."""
    *layer, weight = path.rpartition("transformer/")[2].removesuffix(":0").replace("h_._", "h.").split("/")
    return ".".join([*layer, {"gamma": "weight", "beta": "bias", "embeddings": "weight"}.get(weight, weight)])


def _from_openai(path: str) -> str:
    """``model/h0/ln_1/g`` is ``h.0.ln_1.weight``."""
    *layer, weight = re.sub(r"^h(\d+)/", r"h.\1/", path.removeprefix("model/")).split("/")
    kinds = {"w": ["weight"], "g": ["weight"], "b": ["bias"]}
    return ".".join([*layer, *kinds.get(weight, [weight, "weight"])])
