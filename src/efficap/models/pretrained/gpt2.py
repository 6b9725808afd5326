"""Published GPT-2 weights, into a decoder."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from efficap.errors import InputError
from efficap.hub import pretrained_files
from efficap.models.gpt2 import GPT2
from efficap.models.weights import WEIGHTS_FILE, read_weights

GPT2_SIZES = ("n_layer", "n_head", "n_embd", "n_positions")
_WAY_OUT = (
    "model.decoder.name=DIR takes a directory with config.json, model.safetensors and the tokenizer's files; "
    "model.pretrained=false model.tokenizer.name=null starts from nothing"
)
# Conv1D in transformers: stored as (in, out).
_TRANSPOSED = ("c_attn.weight", "q_attn.weight", "c_proj.weight", "c_fc.weight")


def gpt2_sizes(name: str) -> dict[str, int]:
    """The `GPT2_SIZES` of a checkpoint.

    Raises:
        InputError: it cannot be had, or is not GPT-2's.
    """
    directory = pretrained_files("model.decoder.name", name, ["config.json"], _WAY_OUT)
    try:
        config = json.loads((directory / "config.json").read_text())
        sizes = {size: int(config[size]) for size in GPT2_SIZES}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.decoder.name={name}: {directory}/config.json is no GPT-2's; {_WAY_OUT}"
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
    directory = pretrained_files("model.decoder.name", name, ["config.json", WEIGHTS_FILE], _WAY_OUT)
    weights = gpt2_state_dict(read_weights(directory / WEIGHTS_FILE))
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
