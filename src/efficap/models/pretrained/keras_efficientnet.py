"""Keras's EfficientNetV2 weights as those of timm's ``tf_efficientnetv2_*``, which compute the same."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np
import timm
import torch
from torch import Tensor, nn

from efficap.errors import InputError

ARCHITECTURES = [f"tf_efficientnetv2_{size}" for size in ("b0", "b1", "b2", "b3", "s", "m", "l")]
# Keras scales pictures inside the model: 0 … 255 to -1 … 1 by x / 128 - 1, where timm's weights expect x / 127.5 - 1.
# The b models use ImageNet's mean and deviation, as timm's do.
_KERAS_MEAN_STD = 128 / 255

_STEM_AND_TOP = {"conv_stem": "stem_conv", "bn1": "stem_bn", "conv_head": "top_conv", "bn2": "top_bn"}
_OF_BLOCK = {
    "ConvBnAct": {"conv": "project_conv", "bn1": "project_bn"},
    "EdgeResidual": {
        "conv_exp": "expand_conv",
        "bn1": "expand_bn",
        "conv_pwl": "project_conv",
        "bn2": "project_bn",
    },
    "InvertedResidual": {
        "conv_pw": "expand_conv",
        "bn1": "expand_bn",
        "conv_dw": "dwconv2",
        "bn2": "bn",
        "se.conv_reduce": "se_reduce",
        "se.conv_expand": "se_expand",
        "conv_pwl": "project_conv",
        "bn3": "project_bn",
    },
}
_VARIABLE = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "kernel": "weight",
    "depthwise_kernel": "weight",
    "bias": "bias",
}
_NAMED = re.compile(rf"(?:^|/)(\w+)/({'|'.join(_VARIABLE)})$")
# A checkpoint knows layers by their place; the EfficientNet is a model inside the model.
_NUMBERED = re.compile(rf"layer_with_weights-\d+/layer_with_weights-(\d+)/({'|'.join(_VARIABLE)})$")


def efficientnet_state_dict(weights: Mapping[str, np.ndarray]) -> tuple[str, dict[str, Tensor]]:
    """timm's architecture and its weights, for the weights of a Keras EfficientNetV2 by their names.

    Args:
        weights: by a layer's name and its variable's, ``…/stem_conv/kernel``, or by its place in the model,
            ``layer_with_weights-0/layer_with_weights-0/kernel``. All are used, and none is missing.

    Raises:
        InputError: they are no EfficientNetV2's.
    """
    reasons = []
    for architecture in ARCHITECTURES:
        modules = _keras_layers(architecture)
        state, reason = _fit(weights, modules)
        if not reason:
            return architecture, state
        reasons.append((len(state), f"{reason} {architecture}"))
    raise InputError(f"the encoder's file holds no EfficientNetV2 of Keras: {max(reasons)[1]}")


def mean_and_std(architecture: str) -> dict[str, list[float]]:
    """The ``mean`` and ``std`` that Keras builds into this model; nothing where they are timm's own."""
    if architecture.rsplit("_", 1)[-1].startswith("b"):
        return {}
    return dict.fromkeys(("mean", "std"), [_KERAS_MEAN_STD] * 3)


@functools.cache
def _keras_layers(architecture: str) -> dict[str, tuple[str, nn.Module]]:
    """timm's modules and their names, by Keras's names of the same layers, in Keras's order."""
    with torch.device("meta"):
        backbone = timm.create_model(architecture, num_classes=0)
    modules = dict(backbone.named_modules())
    names: dict[str, str] = {}
    for name, module in modules.items():
        if name in _STEM_AND_TOP:
            names[_STEM_AND_TOP[name]] = name
        elif type(module).__name__ in _OF_BLOCK:
            _, stage, place = name.split(".")
            block = f"block{int(stage) + 1}{chr(ord('a') + int(place))}"
            for ours, theirs in _OF_BLOCK[type(module).__name__].items():
                names[f"{block}_{theirs}"] = f"{name}.{ours}"
    return {theirs: (ours, modules[ours]) for theirs, ours in names.items()}


def _fit(
    weights: Mapping[str, np.ndarray], layers: dict[str, tuple[str, nn.Module]]
) -> tuple[dict[str, Tensor], str]:
    """The weights that fit these layers, and a reason where not all do."""
    in_order = list(layers)
    state: dict[str, Tensor] = {}
    reason = ""
    for key, value in weights.items():
        if found := _NUMBERED.search(key):
            place = int(found[1])
            layer = in_order[place] if place < len(in_order) else ""
        elif found := _NAMED.search(key):
            layer = found[1]
        if not found or layer not in layers:
            reason = f"{key} has no place in"
            continue
        name, module = layers[layer]
        weight = _in_torch_order(value, found[2])
        expected = getattr(module, _VARIABLE[found[2]], None)
        if expected is None or weight.shape != expected.shape:
            reason = f"{key} of shape {value.shape} has no place in"
            continue
        state[f"{name}.{_VARIABLE[found[2]]}"] = weight
        if hasattr(module, "num_batches_tracked"):
            state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    whole = sum(len(module.state_dict()) for _, module in layers.values())
    if not reason and len(state) != whole:
        reason = f"{whole - len(state)} weights are missing for"
    return state, reason


def _in_torch_order(value: np.ndarray, variable: str) -> Tensor:
    weight = torch.from_numpy(np.array(value, dtype=np.float32))
    if variable == "kernel":
        return weight.permute(3, 2, 0, 1).contiguous()  # (h, w, in, out) -> (out, in, h, w)
    if variable == "depthwise_kernel":
        return weight.permute(2, 3, 0, 1).contiguous()  # (h, w, C, 1) -> (C, 1, h, w)
    return weight
