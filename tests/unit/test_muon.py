"""Muon against the singular value decomposition, torch's own Muon and torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model

from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.training.muon import Muon, orthogonal
from efficap.training.optim import build_optimizer, parameter_groups

LR = {"encoder": 1e-3, "bridge": 1e-3, "decoder": 1e-3}
SETTINGS = {"betas": (0.9, 0.98), "eps": 1e-8, "momentum": 0.9}


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)], ids=["wide", "tall", "square"])
def test_an_update_keeps_the_directions_of_the_gradient_and_evens_their_sizes(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = u.T @ orthogonal(matrix).float() @ vh.T
    assert s.max() / s.min() > 1.5
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < 0.1  # bfloat16


def test_matrices_move_as_by_torchs_muon() -> None:
    torch.manual_seed(0)
    start = torch.randn(16, 48)
    mine, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    group = {"params": [mine], "lr": 0.01, "weight_decay": 0.1, "is_orthogonal": True}
    ours = Muon([group], **SETTINGS)
    torchs = torch.optim.Muon(
        [other], lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradient = torch.randn(16, 48)
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        torchs.step()
    assert (mine - start).abs().mean() > 5e-3
    assert torch.allclose(mine, other, atol=1e-3)


def test_all_else_moves_as_by_torchs_adamw() -> None:
    torch.manual_seed(0)
    start = torch.randn(30)
    mine, other = (torch.nn.Parameter(start.clone()) for _ in range(2))
    ours = Muon([{"params": [mine], "lr": 0.01, "weight_decay": 0.1}], **SETTINGS)
    torchs = torch.optim.AdamW([other], lr=0.01, weight_decay=0.1, betas=(0.9, 0.98))
    for _ in range(5):
        gradient = torch.randn(30)
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        torchs.step()
    assert torch.allclose(mine, other, atol=1e-6)


def test_without_gradients_a_step_does_nothing() -> None:
    captioner = build_model(tiny_model(), 97)
    optimizer = Muon(parameter_groups(captioner, lr=LR, weight_decay=0.1, matrix_lr=2.0), **SETTINGS)
    before = {name: p.clone() for name, p in captioner.named_parameters()}
    optimizer.step()
    assert all(torch.equal(before[name], p) for name, p in captioner.named_parameters())
    assert not optimizer.state


@pytest.mark.parametrize("share", [3.0, 0.0])
def test_matrices_and_convolutions_take_their_own_learning_rate(share: float) -> None:
    captioner = build_model(tiny_model(), 97)
    groups = parameter_groups(captioner, lr=LR, weight_decay=0.1, matrix_lr=share)
    moved = {id(p): group["lr"] for group in groups if group.get("is_orthogonal") for p in group["params"]}
    assert {round(lr, 6) for lr in moved.values()} == {share * 1e-3}
    names = {id(p): name for name, p in captioner.named_parameters()}
    found = {names[key] for key in moved}
    assert "decoder.h.0.attn.c_attn.weight" in found
    assert "encoder.backbone.conv_stem.weight" in found
    assert (
        not {"decoder.wte.weight", "decoder.wpe.weight", "bridge.positions.weight", "decoder.ln_f.weight"}
        & found
    )
    depthwise = {
        f"encoder.backbone.{name}.weight"
        for name, layer in captioner.encoder.backbone.named_modules()
        if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1
    }
    assert depthwise
    assert not depthwise & found
    assert {id(p) for group in groups for p in group["params"]} == set(names)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"matrix_lr": -1.0}, "optimizer.matrix_lr=-1.0 must be at least 0"),
        ({"matrix_lr": 1.0, "momentum": 1.0}, "optimizer.momentum=1.0 must be at least 0 and below 1"),
    ],
)
def test_a_setting_out_of_its_range_is_refused(option: dict[str, float], message: str) -> None:
    settings = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 1, "final_lr": 0.0}
    with pytest.raises(InputError, match=message):
        build_optimizer(
            build_model(tiny_model(), 97),
            lambda _: 0.0,
            lr=LR,
            layer_decay=1.0,
            fused=True,
            **settings,
            **option,
        )
