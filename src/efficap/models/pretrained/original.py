"""Weights of the TensorFlow project that this one succeeds, into the bridge and the decoder.

Its variables are told by the ends of their names, which Keras's HDF5 files and TensorFlow's checkpoints share:
``w/c_attn/attn/h0`` is the decoder's first, ``w/c_attn/attn/block_0`` the encoder's. All of them must be known.

Its cross-attention has no query projection: here one that changes nothing. Its special tokens' embeddings, a table of
their own, follow the vocabulary's. Its positions count from 1, so that the first is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from efficap.errors import InputError

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_KIND = {
    "w": "weight",
    "g": "weight",
    "b": "bias",
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "bias": "bias",
}
_DECODER_BLOCK = {
    "ln_1": "ln_1",
    "c_attn/attn": "attn.c_attn",
    "c_proj/attn": "attn.c_proj",
    "ln_2": "ln_2",
    "c_fc/mlp": "mlp.c_fc",
    "c_proj/mlp": "mlp.c_proj",
}
_BRIDGE_BLOCK = {
    "ln_1": "norm_1",
    "c_attn/attn": "qkv",
    "c_proj/attn": "attention_out",
    "ln_2": "norm_2",
    "c_fc/mlp": "mlp.0",
    "c_proj/mlp": "mlp.2",
}
_PARTS = "|".join(_DECODER_BLOCK)
_DECODER_BLOCK_END = re.compile(rf"(?:^|/)([wgb])/({_PARTS})/h(\d+)$")
_CROSS_NORM_END = re.compile(r"(?:^|/)([gb])/cross_norm1_h(\d+)$")
_CROSS_END = re.compile(r"(?:^|/)([wb])/cross_MHA_h(\d+)_cross_(inp|out)$")
_FINAL_NORM_END = re.compile(r"(?:^|/)([gb])/ln_f$")
_TABLE_END = re.compile(r"(?:^|/)(wte|wpe|wsp)$")
_BRIDGE_BLOCK_END = re.compile(rf"(?:^|/)([wgb])/({_PARTS})/block_(\d+)$")
_BRIDGE_ENDS = {
    "norm_in": re.compile(r"/(?:group_normalization(?:_\d+)?|norm_inp)/(gamma|beta)$"),
    "project": re.compile(r"/(?:conv1d(?:_\d+)?|pre_emb)/(kernel|bias)$"),
    "positions": re.compile(r"/(?:position_embedding(?:_\d+)?|pos)/embeddings()$"),
}


def variables(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of a Keras HDF5 file or of a TensorFlow checkpoint by their variables' names.

    What an optimiser keeps, and counters, are left out.
    """
    named = {}
    for key, value in weights.items():
        name = key.removesuffix(_VALUE).replace(".S", "/").removesuffix(":0")
        is_weight = ".OPTIMIZER_SLOT" not in name and not name.startswith(("optimizer", "save_counter"))
        if is_weight:
            named[name] = value
    return named


def decoder_state_dict(weights: Mapping[str, np.ndarray], *, past: bool = True) -> dict[str, Tensor]:
    """The decoder's `variables` under the names of `efficap.models.gpt2.GPT2`.

    Args:
        weights: of the decoder's file.
        past: whether the decoder saw an empty place before the first token, as it was trained; its positions then
            count from 1, and the first is dropped.

    Raises:
        InputError: a variable that no decoder has, or one missing.
    """
    state: dict[str, Tensor] = {}
    tables: dict[str, Tensor] = {}
    for name, value in weights.items():
        if found := _TABLE_END.search(name):
            tables[found[1]] = torch.from_numpy(np.array(value, dtype=np.float32))
        elif key := _decoder_key(name):
            state[key] = _weight(value)
        else:
            raise InputError(f"the decoder's file has a weight {name} that no decoder of that project has")
    missing = {"wte", "wpe", "wsp"} - tables.keys()
    if missing:
        raise InputError(f"the decoder's file lacks {', '.join(sorted(missing))}")
    width = tables["wte"].shape[1]
    for layer in {key.split(".")[1] for key in state if key.startswith("h.")}:
        state[f"h.{layer}.crossattention.q_attn.weight"] = torch.eye(width)  # the hidden state is the query
        state[f"h.{layer}.crossattention.q_attn.bias"] = torch.zeros(width)
    state["wte.weight"] = torch.cat([tables["wte"], tables["wsp"]])
    state["wpe.weight"] = tables["wpe"][int(past) :].clone()
    return state


def _decoder_key(name: str) -> str | None:
    if found := _DECODER_BLOCK_END.search(name):
        return f"h.{found[3]}.{_DECODER_BLOCK[found[2]]}.{_KIND[found[1]]}"
    if found := _CROSS_NORM_END.search(name):
        return f"h.{found[2]}.ln_cross_attn.{_KIND[found[1]]}"
    if found := _CROSS_END.search(name):
        part = "c_attn" if found[3] == "inp" else "c_proj"
        return f"h.{found[2]}.crossattention.{part}.{_KIND[found[1]]}"
    if found := _FINAL_NORM_END.search(name):
        return f"ln_f.{_KIND[found[1]]}"
    return None


def bridge_state_dict(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """The encoder's `variables` behind its EfficientNet, under the names of `OriginalBridge`, and all the others."""
    state: dict[str, Tensor] = {}
    others: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        if key := _bridge_key(name):
            state[key] = _weight(value)
        else:
            others[name] = value
    return state, others


def _bridge_key(name: str) -> str | None:
    if found := _BRIDGE_BLOCK_END.search(name):
        return f"blocks.{found[3]}.{_BRIDGE_BLOCK[found[2]]}.{_KIND[found[1]]}"
    for part, end in _BRIDGE_ENDS.items():
        if found := end.search(f"/{name}"):
            return f"{part}.{_KIND[found[1] or 'w']}"
    return None


def _weight(value: np.ndarray) -> Tensor:
    """Convolutions of width 1, stored as (1, in, out), as torch's Linear has them: (out, in)."""
    weight = torch.from_numpy(np.array(value, dtype=np.float32))
    return weight[0].T.contiguous() if weight.ndim == 3 else weight
