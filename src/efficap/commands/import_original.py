"""Models of the original TensorFlow project as run directories: they caption, are evaluated, and are trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from omegaconf import OmegaConf
from torch import Tensor

from efficap.commands.entry import CONF
from efficap.commands.run_dir import write_run
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.encoder import own_preprocessing
from efficap.models.pretrained.hdf5 import read_hdf5
from efficap.models.pretrained.keras_efficientnet import efficientnet_state_dict, mean_and_std
from efficap.models.pretrained.original import bridge_state_dict, decoder_state_dict, variables
from efficap.models.pretrained.tf_checkpoint import read_tf_checkpoint
from efficap.models.weights import save_weights
from efficap.tokenizer import CaptionTokenizer

_REDUCTION = 32  # pixels of the picture for each position of the feature map, along a side
_USUAL_SIZE = 400  # pixels, of the project's own trainings
_SIZES = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def import_original(
    encoder: Path, decoder: Path, out: Path, *, config: Path, tokenizer: str, past: bool = True
) -> None:
    """Write a run directory with the weights of the original project's encoder and decoder.

    Args:
        encoder, decoder: Keras's HDF5 files, or prefixes of TensorFlow checkpoints (``DIR/encoder`` for
            ``DIR/encoder.index``).
        out: a directory that does not exist yet, or is empty.
        config: JSON with ``hparams`` (``n_vocab``, ``n_ctx``, ``n_embd``, ``n_head``, ``n_layer``), ``n_spe``,
            ``encoder_head``, and ``image_size`` where it is not 400.
        tokenizer: of the decoder, without its special tokens: a directory or a name on the hub.
        past: whether the decoder sees an empty place before the first token, as it was trained.

    Raises:
        InputError: a file is missing or is something else; the message says which.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"--out={out} exists and is no empty directory; name a new or an empty one")
    settings = _settings(config)
    words = CaptionTokenizer.pretrained(tokenizer)
    n_vocab = settings["hparams"]["n_vocab"]
    if words.vocab_size != n_vocab:
        raise InputError(
            f"--tokenizer={tokenizer} has {words.vocab_size} tokens, the model n_vocab={n_vocab}"
        )
    bridge, others = bridge_state_dict(_read("--encoder", encoder))
    architecture, backbone = efficientnet_state_dict(others)
    weights = _prefixed(
        {
            "encoder.backbone": backbone,
            "bridge": bridge,
            "decoder": decoder_state_dict(_read("--decoder", decoder), past=past),
        }
    )
    words = words.with_bos([f"<|special_{place}|>" for place in range(settings["n_spe"])])
    model = _model(settings, architecture, weights, past=past)
    captioner = build_model(model, words.vocab_size)
    try:
        captioner.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{config} does not fit the weights: {' '.join(str(error).split())}") from error
    write_run(out, _run_config(model), words)
    save_weights(captioner.state_dict(), out)
    for part, module in (
        ("encoder", captioner.encoder),
        ("bridge", captioner.bridge),
        ("decoder", captioner.decoder),
    ):
        print(f"{part}: {sum(parameter.numel() for parameter in module.parameters()):,} weights")
    print(f"run directory: {out} ({architecture}, {model['image_size']} pixels)")


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(file.read_text())
        settings["hparams"] = {size: int(settings["hparams"][size]) for size in _SIZES}
        numbers = {"n_spe", "encoder_head"} | ({"image_size"} & settings.keys())
        settings |= {key: int(settings[key]) for key in numbers}
    except OSError as error:
        raise InputError(f"--config={file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--config={file} must be JSON with hparams ({', '.join(_SIZES)}), n_spe and encoder_head, all of "
            f"them numbers; wrong: {error}"
        ) from error
    if settings["n_spe"] < 1:
        raise InputError(
            f"--config={file}: n_spe={settings['n_spe']} must be at least 1, the token that begins captions"
        )
    return settings


def _read(option: str, path: Path) -> dict[str, np.ndarray]:
    """The variables of an HDF5 file, or of a checkpoint of that prefix."""
    if path.is_file() and path.suffix != ".index":
        with path.open("rb") as file:
            if file.read(len(_HDF5_SIGNATURE)) != _HDF5_SIGNATURE:
                raise InputError(f"{option}={path} is no HDF5 file")
        return variables(read_hdf5(path))
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if not prefix.with_name(f"{prefix.name}.index").is_file():
        raise InputError(
            f"{option}={path} is neither an HDF5 file nor the prefix of a checkpoint ({prefix.name}.index)"
        )
    return variables(read_tf_checkpoint(prefix))


def _prefixed(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def _model(
    settings: dict[str, Any], architecture: str, weights: Mapping[str, Tensor], *, past: bool
) -> dict[str, Any]:
    """The model's configuration: all that conf/model has, and this model's own."""
    sizes = settings["hparams"]
    blocks = {key.split(".")[2] for key in weights if key.startswith("bridge.blocks.")}
    model: dict[str, Any] = _composed("small")["model"]
    return {
        **model,
        "image_size": _image_size(settings, len(weights["bridge.positions.weight"]) - 2),
        "pretrained": False,
        "arithmetic": "original" if past else "original_no_past",
        "encoder": {
            **model["encoder"],
            "name": architecture,
            "pretrained": False,
            **own_preprocessing(architecture),
            **mean_and_std(architecture),
            "interpolation": "bilinear",  # TensorFlow's own
            "crop_pct": 1.0,
        },
        "bridge": {**model["bridge"], "n_blocks": len(blocks), "n_heads": settings["encoder_head"]},
        "decoder": {
            **model["decoder"],
            "name": None,
            "pretrained": False,
            "n_layer": sizes["n_layer"],
            "n_head": sizes["n_head"],
            "n_embd": sizes["n_embd"],
            "n_positions": sizes["n_ctx"] - past,
        },
        "tokenizer": {"name": None, "vocab_size": sizes["n_vocab"] + settings["n_spe"]},
    }


def _image_size(settings: dict[str, Any], positions: int) -> int:
    side = round(positions**0.5)
    size: int = settings.get("image_size", _USUAL_SIZE)
    if side * side != positions:
        raise InputError(f"the encoder's file has {positions} positions, no square's: it is no captioner's")
    if -(-size // _REDUCTION) != side:
        if "image_size" in settings:
            raise InputError(
                f"image_size={size} gives {-(-size // _REDUCTION)} positions a side, the encoder's file has {side}"
            )
        size = side * _REDUCTION
    return size


def _run_config(model: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration, as one that was trained on a table of captions that is not known here."""
    config = _composed("small")
    data = {key: None if value == "???" else value for key, value in config["data"].items()}
    return {"name": "original", "model": model, "data": data, "decoding": config["decoding"]}


def _composed(model: str) -> dict[str, Any]:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose(
            "train", [f"model={model}", "data=csv", "decoding=beam", "name=original", "output_dir=."]
        )
    return {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("model", "data", "decoding")}
