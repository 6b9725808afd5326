"""Parameter groups and learning rates, against closed forms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.training.optim import build_optimizer, check_optimizer, parameter_groups

LR = {"encoder": 1e-4, "bridge": 1e-3, "decoder": 3e-4}


def adamw(
    captioner: CaptionModel, progress: Callable[[int], float], **changes: Any
) -> tuple[AdamW, LambdaLR]:
    settings = {
        "lr": LR,
        "betas": (0.9, 0.98),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "layer_decay": 1.0,
        "fused": True,
    }
    return build_optimizer(
        captioner, progress, **{"warmup_steps": 10, "final_lr": 0.1, **settings, **changes}
    )


@pytest.fixture(scope="module")
def captioner() -> CaptionModel:
    return build_model(tiny_model(), 97)


def test_norms_biases_and_embeddings_are_not_decayed(captioner: CaptionModel) -> None:
    decayed = {
        id(parameter)
        for group in parameter_groups(captioner, lr=LR, weight_decay=0.1)
        if group["weight_decay"]
        for parameter in group["params"]
    }
    for module in captioner.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = name == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
            assert (id(parameter) in decayed) == is_matrix, (module, name)


def test_every_trained_parameter_is_in_one_group_with_its_parts_rate(captioner: CaptionModel) -> None:
    groups = parameter_groups(captioner, lr=LR, weight_decay=0.1)
    rates = [(id(parameter), group["lr"]) for group in groups for parameter in group["params"]]
    assert len(rates) == len(dict(rates)) == len(list(captioner.parameters()))
    rate = dict(rates)
    assert rate[id(captioner.encoder.backbone.conv_stem.weight)] == LR["encoder"]
    assert rate[id(captioner.bridge.project.weight)] == LR["bridge"]
    block = captioner.decoder.h[0]
    assert rate[id(block.crossattention.q_attn.weight)] == LR["bridge"], "it starts fresh, as the bridge does"
    assert rate[id(block.attn.c_attn.weight)] == LR["decoder"]


def test_a_frozen_encoder_is_not_given_to_the_optimiser() -> None:
    frozen = build_model(tiny_model(encoder__frozen=True), 97)
    names = {group["name"] for group in parameter_groups(frozen, lr=LR, weight_decay=0.1)}
    assert names == {"bridge", "bridge/no_decay", "decoder", "decoder/no_decay"}


def test_the_rate_warms_up_and_follows_a_cosine_to_its_end(captioner: CaptionModel) -> None:
    optimizer, schedule = adamw(captioner, lambda step: step / 100)
    for step in range(101):
        cosine = 0.1 + 0.9 * (1 + math.cos(math.pi * step / 100)) / 2
        expected = LR["encoder"] * min(1, (step + 1) / 10) * cosine
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        schedule.step()
    assert torch.allclose(
        torch.tensor(schedule.get_last_lr()[0]), torch.tensor(LR["encoder"] * 0.1), rtol=0.1
    )


def test_the_warm_up_takes_no_more_than_a_tenth_of_a_short_training(captioner: CaptionModel) -> None:
    optimizer, schedule = adamw(captioner, lambda step: step / 50, warmup_steps=1000, final_lr=0.0)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(LR["encoder"] * (1 + math.cos(math.pi * 0.1)) / 2)


def test_a_negative_rate_is_refused(captioner: CaptionModel) -> None:
    with pytest.raises(InputError, match=r"optimizer.lr.bridge=-1 must be at least 0"):
        adamw(captioner, lambda step: 0.0, lr={**LR, "bridge": -1})


def test_a_clip_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"optimizer.clip_value=0 must be above 0; null: no clipping"):
        check_optimizer(lr=LR, weight_decay=0.0, layer_decay=1.0, clip_value=0)


def test_moments_that_lie_otherwise_than_their_weights_are_gone_on_with_as_they_were() -> None:
    """A run in shards has kept them contiguous, and fused kernels walk through memory whatever the strides."""
    torch.manual_seed(0)
    captioner = build_model(tiny_model(), 97)
    stem = captioner.encoder.backbone.conv_stem.weight
    assert not stem.is_contiguous()
    optimizer, _ = adamw(captioner, lambda step: 0.0)
    stem.grad = torch.randn_like(stem)
    optimizer.step()
    state, begun = copy.deepcopy(optimizer.state_dict()), stem.detach().clone()
    stem.grad = torch.randn_like(stem)
    optimizer.step()
    expected = stem.detach().clone()
    state["state"] = {
        number: {name: value.contiguous() for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    again, _ = adamw(captioner, lambda step: 0.0)
    again.load_state_dict(state)
    stem.data.copy_(begun)
    again.step()
    assert torch.equal(stem, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_of_the_other_kernel_is_gone_on_with(captioner: CaptionModel, fused: bool) -> None:
    """As a training that goes on with another precision has it."""
    before, _ = adamw(captioner, lambda step: 0.0, fused=not fused)
    after, _ = adamw(captioner, lambda step: 0.0, fused=fused)
    for parameter in captioner.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before.step()
    after.load_state_dict(before.state_dict())
    assert {group["fused"] for group in after.param_groups} == {after.defaults["fused"]} == {fused or None}
    if fused:
        after.found_inf = torch.ones(())  # as a step that is left out sets it
    after.step()
