"""What the optimiser is given: parameter groups and the course of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from efficap.errors import InputError
from efficap.models.captioner import Captioner

PARTS = ("encoder", "bridge", "decoder")


def part_of(name: str) -> str:
    """The part whose learning rate a captioner's parameter takes.

    The cross-attention counts with the bridge: both start fresh beside pretrained weights.
    """
    if "crossattention" in name or "ln_cross_attn" in name:
        return "bridge"
    return name.partition(".")[0]


def parameter_groups(
    captioner: Captioner, *, lr: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Trainable parameters by part and by decay: norms, biases and embeddings are not decayed.

    Args:
        lr: peak learning rate of ``encoder``, ``bridge`` and ``decoder``.
        weight_decay: of the matrices and convolutions.
    """
    embeddings = {id(module.weight) for module in captioner.modules() if isinstance(module, nn.Embedding)}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in captioner.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        decayed = parameter.ndim > 1 and id(parameter) not in embeddings
        group_name = part if decayed else f"{part}/no_decay"
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "lr": lr[part],
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_adamw(
    captioner: Captioner,
    progress: Callable[[int], float],
    *,
    lr: Mapping[str, float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    warmup_steps: int,
    final_lr: float,
    fused: bool,
) -> tuple[torch.optim.AdamW, LambdaLR]:
    """AdamW with linear warm-up and a cosine over the rest of the training.

    Args:
        progress: maps the optimiser steps done to the share of the training that is over, 0 … 1.
        lr: peak learning rate of each part.
        warmup_steps: optimiser steps until the peak; a tenth of the training at most.
        final_lr: share of the peak that is left at the end.
        fused: torch's fused kernel.

    Raises:
        InputError: a learning rate or a decay below 0, or nothing to train.
    """
    for setting, value in {
        **{f"lr.{part}": lr[part] for part in PARTS},
        "weight_decay": weight_decay,
    }.items():
        if value < 0:
            raise InputError(f"optimizer.{setting}={value} must be at least 0")
    groups = parameter_groups(captioner, lr=lr, weight_decay=weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=fused)

    def share_of_peak(step: int) -> float:
        over = min(1.0, progress(step))
        warmup = min(1.0, max((step + 1) / max(1, warmup_steps), 10 * over))
        return warmup * (final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * over)))

    return optimizer, LambdaLR(optimizer, share_of_peak)
