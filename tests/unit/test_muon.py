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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)], ids=["wide", "tall", "square"])
def test_an_update_keeps_the_directions_of_the_gradient_and_evens_their_sizes(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    count = min(shape)
    u, vh = (torch.linalg.qr(torch.randn(2, size, count))[0] for size in shape)
    s = torch.logspace(-2, 0, count)  # of the largest: 0.01 … 1
    found = u.mT @ orthogonal((u * s @ vh.mT).to(dtype)).float() @ vh
    sizes = found.diagonal(dim1=1, dim2=2)
    assert sizes.min() > (0.75 if dtype == torch.float32 else 0.65)  # bfloat16 rounds the smallest away
    assert sizes.max() < 1.25
    assert (found - sizes.diag_embed()).abs().max() < (0.01 if dtype == torch.float32 else 0.1)


def test_what_is_smaller_than_a_three_hundredth_grows_all_the_same_and_nothing_stays_nothing() -> None:
    matrices = torch.zeros(2, 3, 3)
    matrices[1] = torch.diag(torch.tensor([1.0, 1e-3, 0.0]))
    found = orthogonal(matrices).float()
    assert not found[0].any()
    assert 0.2 < found[1, 1, 1] < 0.4
    assert found[1, 2, 2] == 0


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
    # torch's takes five of Jordan's steps, which leave other singular values than ours between 0.7 and 1.2.
    assert (mine - other).norm() < 0.2 * (other - start).norm()


def test_a_matrix_moves_alike_by_itself_and_among_others_of_its_shape() -> None:
    torch.manual_seed(0)
    starts = [torch.randn(8, 3, 2, 2), torch.randn(8, 12), torch.randn(12, 8), torch.randn(8, 12)]
    gradients = [torch.randn_like(start) for start in starts]

    def moved(groups: list[list[int]]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        for group in groups:
            shared = {"lr": 0.01, "weight_decay": 0.1, "is_orthogonal": True}
            Muon([{"params": [parameters[i] for i in group], **shared}], **SETTINGS).step()
        return [parameter.detach() for parameter in parameters]

    for one, other, start in zip(moved([[0, 1, 2, 3]]), moved([[0], [1], [2], [3]]), starts, strict=True):
        assert not torch.equal(one, start)
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


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


def test_a_step_that_is_told_to_be_bad_changes_nothing_and_one_that_is_not_is_as_ever() -> None:
    """As torch's fused optimisers have it: whether it is lies on the device, and nobody waits for it."""
    torch.manual_seed(0)
    start, gradients = (torch.randn(2, 4, 6), torch.randn(2, 5)), (torch.randn(4, 6), torch.randn(5))
    moved = {}
    for told in (None, 0.0, 1.0):
        matrix, vector = (torch.nn.Parameter(value[0].clone()) for value in start)
        settings = {"lr": 0.1, "weight_decay": 0.1}
        optimizer = Muon(
            [{"params": [matrix], "is_orthogonal": True, **settings}, {"params": [vector], **settings}],
            **SETTINGS,
            fused=True,
        )
        matrix.grad, vector.grad = (gradient.clone() for gradient in gradients)
        optimizer.step()
        if told is not None:
            optimizer.found_inf = torch.tensor(told)  # type: ignore[attr-defined]
        before = [p.detach().clone() for p in (matrix, vector)]
        buffer = optimizer.state[matrix]["momentum_buffer"].clone()
        if told:
            matrix.grad[0, 0], vector.grad[0] = torch.nan, torch.inf
        optimizer.step()
        moved[told] = [matrix.detach(), vector.detach()]
        if told:
            assert all(torch.equal(*pair) for pair in zip(moved[told], before, strict=True))
            assert torch.equal(optimizer.state[matrix]["momentum_buffer"], buffer)
            assert optimizer.state[vector]["step"] == 1
    for ours, other in zip(moved[0.0], moved[None], strict=True):
        torch.testing.assert_close(ours, other)


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


def test_its_state_comes_to_the_device_of_the_parameters() -> None:
    """Of a checkpoint, which is read into main memory; torch leaves steps there."""
    on_cpu, elsewhere = (torch.nn.Parameter(torch.zeros(3, device=device)) for device in ("cpu", "meta"))
    before = Muon([{"params": [on_cpu], "lr": 0.1, "weight_decay": 0.0}], **SETTINGS)
    on_cpu.grad = torch.ones(3)
    before.step()
    after = Muon([{"params": [elsewhere], "lr": 0.1, "weight_decay": 0.0}], **SETTINGS)
    after.load_state_dict(before.state_dict())
    assert {value.device.type for value in after.state[elsewhere].values()} == {"meta"}
