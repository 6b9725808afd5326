"""Published GPT-2 weights, into a decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from efficap.errors import InputError
from efficap.models.gpt2 import GPT2
from efficap.models.pretrained.gpt2_files import SETTING, read_gpt2_config, read_gpt2_weights

GPT2_SIZES = ("n_layer", "n_head", "n_embd", "n_positions")
MAX_PARAMETERS = 10_000_000_000  # GPT-2's largest has 1.6e9; a made-up config.json may say anything
MAX_PADDING = 1024  # rows; Megatron pads a vocabulary to a multiple of 128 for each of up to 8 GPUs
# Conv1D in transformers: stored as (in, out).
_TRANSPOSED = ("c_attn.weight", "q_attn.weight", "c_proj.weight", "c_fc.weight")


def gpt2_sizes(name: str) -> dict[str, int]:
    """The `GPT2_SIZES` of a checkpoint, by its config.json or OpenAI's hparams.json.

    Raises:
        InputError: it cannot be had, or is not GPT-2's.
    """
    config = read_gpt2_config(name)
    sizes: dict[str, int] = {}
    for size in GPT2_SIZES:
        value = config.get(size)
        if not isinstance(value, int) or value < 1:
            raise InputError(
                f"{SETTING}={name} is no GPT-2: its config has {size}={value}, no positive number"
            )
        sizes[size] = value
    parameters = 12 * sizes["n_layer"] * sizes["n_embd"] ** 2 + sizes["n_positions"] * sizes["n_embd"]
    if parameters > MAX_PARAMETERS or sizes["n_layer"] > 1000:
        said = ", ".join(f"{size}={value}" for size, value in sizes.items())
        raise InputError(
            f"{SETTING}={name}: its config has {said}; more than {MAX_PARAMETERS:.0e} parameters or 1000 layers "
            "are not built"
        )
    _check_is_gpt2(name, config)
    return sizes


def _check_is_gpt2(name: str, config: dict[str, Any]) -> None:
    """Raises InputError where a checkpoint's arithmetic is not GPT-2's; it would load and be wrong."""
    own = {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
    }
    if config.get("activation_function") == "gelu_pytorch_tanh":  # the same by another name
        config = {**config, "activation_function": "gelu_new"}
    for key, value in own.items():
        if config.get(key, value) != value:
            raise InputError(
                f"model.decoder.name={name} has {key}={config[key]}; only {value}, as in GPT-2, is known"
            )


def load_gpt2(decoder: GPT2, name: str) -> None:
    """Load a GPT-2 from a directory or the hub (see `gpt2_files`); cross-attention adds nothing yet.

    Half precision is widened to the decoder's own. Rows that pad the checkpoint's vocabulary are dropped.

    Raises:
        InputError: the weights cannot be had, or a weight is missing or has another shape.
    """
    weights = gpt2_state_dict(read_gpt2_weights(name))
    expected = {key: value for key, value in decoder.state_dict().items() if not _is_cross_attention(key)}
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise InputError(
            f"model.decoder.name={name} lacks {len(missing)} weights of a GPT-2, {missing[0]} first"
        )
    vocab_size = len(expected["wte.weight"])
    if weights["wte.weight"].ndim and vocab_size < len(weights["wte.weight"]) < vocab_size + MAX_PADDING:
        weights["wte.weight"] = weights["wte.weight"][:vocab_size]
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
    if "lm_head.weight" in renamed:  # tied: a file may hold it in place of the embedding
        renamed.setdefault("wte.weight", renamed["lm_head.weight"])
    return {
        key: value.T if key.endswith(_TRANSPOSED) and value.ndim == 2 else value
        for key, value in renamed.items()
        if not key.endswith((".attn.bias", ".masked_bias", "lm_head.weight", "crossattention.bias"))
    }


def transformers_state_dict(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `GPT2` under the names and in the order of transformers' ``GPT2LMHeadModel``.

    The head is left out, which is tied there as well.
    """
    return {
        f"transformer.{key}": (value.T if key.endswith(_TRANSPOSED) else value).contiguous()
        for key, value in weights.items()
    }


def _is_cross_attention(key: str) -> bool:
    return "crossattention" in key or "ln_cross_attn" in key
