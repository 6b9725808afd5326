"""Weights in and out: GPT-2's and EfficientNet's into a new captioner, a captioner's into its run directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from efficap.errors import InputError
from efficap.hub import pretrained_files
from efficap.models.captioner import Captioner
from efficap.models.encoder import EncoderSpec
from efficap.models.gpt2 import GPT2

WEIGHTS_FILE = "model.safetensors"

_GPT2_SIZES = ("n_layer", "n_head", "n_embd", "n_positions")
_GPT2_WAY_OUT = (
    "model.decoder.name=DIR takes a directory with config.json, model.safetensors and the tokenizer's files; "
    "model.pretrained=false model.tokenizer.name=null starts from nothing"
)
# Conv1D in transformers: stored as (in, out).
_TRANSPOSED = ("c_attn.weight", "q_attn.weight", "c_proj.weight", "c_fc.weight")


def resolve_model(model: dict[str, Any]) -> dict[str, Any]:
    """Fill what the model's configuration leaves to its pretrained parts.

    Preprocessing (mean, std, interpolation, crop_pct) comes from timm's registry where it is null, the decoder's
    sizes from its checkpoint where that is pretrained, the bridge's heads from the decoder. The result builds the
    same model without network.

    Raises:
        InputError: an unknown EfficientNet, or a GPT-2 that cannot be had.
    """
    encoder, bridge, decoder = dict(model["encoder"]), dict(model["bridge"]), dict(model["decoder"])
    spec = EncoderSpec.of(encoder["name"])
    for key in ("mean", "std", "interpolation", "crop_pct"):
        if encoder[key] is None:
            value = getattr(spec, key)
            encoder[key] = list(value) if isinstance(value, tuple) else value
    if decoder["pretrained"]:
        decoder |= _gpt2_sizes(decoder["name"])
    if bridge["n_heads"] is None:
        bridge["n_heads"] = decoder["n_head"]
    return {**model, "encoder": encoder, "bridge": bridge, "decoder": decoder}


def preprocessing(model: dict[str, Any]) -> dict[str, Any]:
    """How pictures are made for a resolved model: ``image_size``, ``interpolation`` and ``crop_pct``."""
    encoder = model["encoder"]
    return {
        "image_size": model["image_size"],
        "interpolation": encoder["interpolation"],
        "crop_pct": encoder["crop_pct"],
    }


def build_captioner(model: dict[str, Any], vocab_size: int) -> Captioner:
    """A captioner with fresh weights from a resolved model configuration (see `resolve_model`)."""
    encoder, decoder = model["encoder"], model["decoder"]
    return Captioner(
        image_size=model["image_size"],
        vocab_size=vocab_size,
        encoder={key: encoder[key] for key in ("name", "mean", "std", "frozen", "drop_path_rate")},
        bridge={key: model["bridge"][key] for key in ("n_blocks", "n_heads", "dropout")},
        decoder={key: decoder[key] for key in (*_GPT2_SIZES, "dropout")},
    )


def load_pretrained_parts(captioner: Captioner, model: dict[str, Any]) -> None:
    """Load the pretrained weights that a resolved model configuration asks for.

    Raises:
        InputError: they cannot be had or do not fit; the message says how to do without.
    """
    if model["decoder"]["pretrained"]:
        load_gpt2(captioner.decoder, model["decoder"]["name"])
    if model["encoder"]["pretrained"]:
        captioner.encoder.load_pretrained(model["encoder"]["name"], model["encoder"]["weights_file"])


def _gpt2_sizes(name: str) -> dict[str, int]:
    directory = pretrained_files("model.decoder.name", name, ["config.json"], _GPT2_WAY_OUT)
    try:
        config = json.loads((directory / "config.json").read_text())
        sizes = {size: int(config[size]) for size in _GPT2_SIZES}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.decoder.name={name}: {directory}/config.json is no GPT-2's; {_GPT2_WAY_OUT}"
        ) from error
    _check_is_gpt2(name, config)
    return sizes


def _check_is_gpt2(name: str, config: dict[str, Any]) -> None:
    """Raises InputError where a checkpoint's arithmetic is not GPT-2's; it would load and be wrong."""
    own = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    }
    for key, value in own.items():
        if config.get(key, value) != value:
            raise InputError(
                f"model.decoder.name={name} has {key}={config[key]}; only {value}, as in GPT-2, is known"
            )


def load_gpt2(decoder: GPT2, name: str) -> None:
    """Load a GPT-2 in transformers' form (safetensors) from a directory or the hub; cross-attention adds nothing yet.

    Half precision is widened to the decoder's own.

    Raises:
        InputError: the weights cannot be had, or a weight is missing or has another shape.
    """
    directory = pretrained_files("model.decoder.name", name, ["config.json", WEIGHTS_FILE], _GPT2_WAY_OUT)
    weights = gpt2_state_dict(_read_weights(directory / WEIGHTS_FILE))
    expected = {key: value for key, value in decoder.state_dict().items() if not _is_cross_attention(key)}
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise InputError(
            f"model.decoder.name={name} lacks {len(missing)} weights of a GPT-2, {missing[0]} first"
        )
    for key, value in expected.items():
        if weights[key].shape != value.shape:
            hint = "; its tokenizer is another one" if key == "wte.weight" else ""
            raise InputError(
                f"model.decoder.name={name}: {key} has shape {tuple(weights[key].shape)}, "
                f"the model needs {tuple(value.shape)}{hint}"
            )
    decoder.load_state_dict(
        {key: weights[key].to(value.dtype) for key, value in expected.items()}, strict=False
    )
    decoder.silence_cross_attention()


def gpt2_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' GPT-2 weights under this project's names and in torch's (out, in) order."""
    renamed = {key.removeprefix("transformer."): value for key, value in weights.items()}
    return {
        key: value.T.contiguous() if key.endswith(_TRANSPOSED) else value
        for key, value in renamed.items()
        if not key.endswith((".attn.bias", ".masked_bias", "lm_head.weight", "crossattention.bias"))
    }


def _is_cross_attention(key: str) -> bool:
    return "crossattention" in key or "ln_cross_attn" in key


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"{file} does not exist")
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise InputError(f"{file} is damaged or no safetensors file ({error})") from error


def save_weights(weights: dict[str, Tensor], run_dir: Path) -> None:
    """Write a captioner's weights to its run directory; a reader sees the old file or the new one, whole."""
    file = run_dir / WEIGHTS_FILE
    temporary = file.with_suffix(".tmp")
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, temporary)
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)  # safetensors writes it for its owner alone
    os.replace(temporary, file)


def load_captioner(run_dir: Path, model: dict[str, Any], vocab_size: int) -> Captioner:
    """The trained captioner of a run directory, in evaluation mode.

    Args:
        run_dir: holds model.safetensors.
        model: the resolved model configuration of that run.
        vocab_size: of that run's tokenizer.

    Raises:
        InputError: there are no weights, or they are another model's.
    """
    if not (run_dir / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{run_dir} holds no {WEIGHTS_FILE}: training writes it at its first validation; has it come that far?"
        )
    weights = _read_weights(run_dir / WEIGHTS_FILE)
    captioner = build_captioner(model, vocab_size)
    try:
        captioner.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{run_dir / WEIGHTS_FILE} does not fit {run_dir}/config.yaml: {error}") from error
    return captioner.eval()
