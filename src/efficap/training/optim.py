"""The optimiser: its parameter groups and the course of their learning rates."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from efficap.errors import InputError
from efficap.models.captioner import CaptionModel
from efficap.training.muon import Muon

PARTS = ("encoder", "bridge", "decoder")


def part_of(name: str) -> str:
    """The part whose learning rate a captioner's parameter takes.

    The cross-attention counts with the bridge: both start fresh beside pretrained weights.
    """
    if "crossattention" in name or "ln_cross_attn" in name:
        return "bridge"
    return name.partition(".")[0]


def depths(captioner: CaptionModel) -> dict[str, int]:
    """How far below the top of its part each parameter lies, in stages of the encoder and layers of the decoder.

    The top is what a pretrained part has that is most its task's own: it learns fastest, and what starts fresh with it.
    """
    stages, layers = len(captioner.encoder.backbone.blocks), len(captioner.decoder.h)
    found = {}
    for name, _ in captioner.named_parameters():
        depth = 0
        if stage := re.match(r"encoder\.backbone\.(?:blocks\.(\d+)\.|(conv_stem|bn1)\.)", name):
            depth = stages if stage[2] else stages - 1 - int(stage[1])
        elif part_of(name) == "decoder":
            layer = re.match(r"decoder\.h\.(\d+)\.", name)
            depth = layers - 1 - int(layer[1]) if layer else 0 if "ln_f" in name else layers
        found[name] = depth
    return found


def parameter_groups(
    captioner: CaptionModel,
    *,
    lr: Mapping[str, float],
    weight_decay: float,
    layer_decay: float = 1.0,
    matrix_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters by part, depth and decay: norms, biases and embeddings are not decayed.

    Args:
        lr: peak learning rate of ``encoder``, ``bridge`` and ``decoder``.
        weight_decay: of the matrices and convolutions.
        layer_decay: a stage's or layer's learning rate as a share of that of the one above (Howard and Ruder, 2018,
            https://arxiv.org/abs/1801.06146); 1: all of a part learn alike.
        matrix_lr: share of `lr` of what Muon moves, which has groups of its own; None: it moves nothing.
    """
    depth_of = depths(captioner) if layer_decay != 1 else {}
    embeddings = {id(module.weight) for module in captioner.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in captioner.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        decayed = parameter.ndim > 1 and id(parameter) not in embeddings
        depth = depth_of.get(name, 0)
        # A depthwise convolution is no matrix: each of its channels has one input.
        is_orthogonal = matrix_lr is not None and decayed and parameter.shape[1] > 1
        share = matrix_lr if matrix_lr is not None and is_orthogonal else 1.0
        kind = "" if decayed else "/no_decay"
        group_name = f"{part}{'/muon' if is_orthogonal else kind}" + (f"/{depth}" if depth else "")
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "lr": lr[part] * layer_decay**depth * share,
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
                **({"is_orthogonal": True} if is_orthogonal else {}),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(
    captioner: CaptionModel,
    progress: Callable[[int], float],
    *,
    lr: Mapping[str, float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    layer_decay: float,
    warmup_steps: int,
    final_lr: float,
    fused: bool,
    matrix_lr: float | None = None,
    momentum: float | None = None,
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """AdamW, or Muon, with linear warm-up and a cosine over the rest of the training.

    Args:
        progress: maps the optimiser steps done to the share of the training that is over, 0 … 1.
        lr, weight_decay, layer_decay, matrix_lr: see `parameter_groups`.
        warmup_steps: optimiser steps until the peak; a tenth of the training at most.
        final_lr: share of the peak that is left at the end.
        fused: torch's fused kernel; of Muon, leave out a bad step on the device, as that does.
        momentum: of Muon.

    Raises:
        InputError: a learning rate or a decay below 0, or a layer decay or a momentum outside 0 … 1.
    """
    check_optimizer(
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        matrix_lr=matrix_lr,
        momentum=momentum,
    )
    groups = parameter_groups(
        captioner, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay, matrix_lr=matrix_lr
    )
    optimizer: torch.optim.Optimizer
    if matrix_lr is None:
        # None, and not False, lets torch take its second fastest.
        optimizer = torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=fused or None)
    else:
        assert momentum is not None
        optimizer = Muon(groups, betas=(betas[0], betas[1]), eps=eps, momentum=momentum, fused=fused)

    optimizer.register_load_state_dict_pre_hook(_keep_kernel)
    optimizer.register_load_state_dict_post_hook(_lay_out)

    @functools.lru_cache(maxsize=1)  # each group asks for the same step
    def share_of_peak(step: int) -> float:
        over = min(1.0, progress(step))
        warmup = min(1.0, max((step + 1) / max(1, warmup_steps), 10 * over))
        return warmup * (final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * over)))

    # A plain function: of any other callable LambdaLR's state would take the insides.
    return optimizer, LambdaLR(optimizer, lambda step: share_of_peak(step))


def _keep_kernel(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state for the kernel of now: with another precision it may be another one."""
    groups = [{**group, "fused": optimizer.defaults["fused"]} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Lay moments out as their weights are: fused kernels go through both alike, and a run in shards has others."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_optimizer(
    *,
    lr: Mapping[str, float],
    weight_decay: float,
    layer_decay: float,
    clip_value: float | None = None,
    matrix_lr: float | None = None,
    momentum: float | None = None,
    **_: Any,
) -> None:
    """Check the values of conf/optimizer.

    Raises:
        InputError: a rate or a decay below 0, a layer decay or a momentum outside 0 … 1, AdamW's momentum, a clip of 0.
    """
    rates = {
        **{f"lr.{part}": lr[part] for part in PARTS},
        "weight_decay": weight_decay,
        "matrix_lr": matrix_lr or 0.0,
    }
    for setting, value in rates.items():
        if value < 0:
            raise InputError(f"optimizer.{setting}={value} must be at least 0")
    if momentum is not None and matrix_lr is None:
        raise InputError(
            f"optimizer.momentum={momentum} is Muon's, and optimizer.matrix_lr is not given: choose optimizer=muon, or "
            "optimizer.betas, AdamW's own"
        )
    if momentum is None and matrix_lr is not None:
        raise InputError(
            f"optimizer.matrix_lr={matrix_lr} is Muon's, and optimizer.momentum is not given: choose optimizer=muon"
        )
    if momentum is not None and not 0 <= momentum < 1:
        raise InputError(f"optimizer.momentum={momentum} must be at least 0 and below 1")
    if not 0 < layer_decay <= 1:
        raise InputError(f"optimizer.layer_decay={layer_decay} must be above 0 and at most 1; 1: no decay")
    if clip_value is not None and clip_value <= 0:
        raise InputError(f"optimizer.clip_value={clip_value} must be above 0; null: no clipping of elements")
