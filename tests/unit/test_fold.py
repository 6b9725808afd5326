"""BatchNorm that goes into the convolutions leaves every feature map as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import write_random_run
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficap.commands.run_dir import RunDirectory
from efficap.models.encoder import ImageEncoder
from efficap.models.fold import fold_norms

IMAGES = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def trained(name: str, output_stride: int = 32) -> ImageEncoder:
    """An encoder whose BatchNorms all do something."""
    encoder = ImageEncoder(
        name=name,
        image_size=64,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        frozen=True,
        drop_path_rate=0.0,
        output_stride=output_stride,
    )
    for norm in norms(encoder):
        numbers = norm.state_dict()
        for key in ("running_mean", "bias"):
            numbers[key].normal_(std=0.1)
        for key in ("running_var", "weight"):
            numbers[key].uniform_(0.5, 1.5)
    return encoder


def norms(encoder: nn.Module) -> list[_BatchNorm]:
    return [layer for layer in encoder.modules() if isinstance(layer, _BatchNorm)]


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("test_efficientnet", 0),
        ("efficientnet_b0", 0),
        ("efficientnet_lite0", 0),  # ReLU6 in place of SiLU
        ("tf_efficientnet_es", 0),  # edge residuals
        ("tf_efficientnetv2_b0", 0),  # convolutions without an expansion
        ("efficientnet_blur_b0", 0),  # a blur in place of strides
        ("efficientnet_cc_b0_4e", 24),  # convolutions whose weights are another picture's
        ("mixnet_s", 34),  # several convolutions side by side have one BatchNorm
        ("test_efficientnet_gn", 0),  # has none
    ],
)
@torch.inference_mode()
def test_a_folded_encoder_makes_the_same_maps(name: str, left: int) -> None:
    encoder = trained(name).double()
    expected = encoder(IMAGES)
    fold_norms(encoder.backbone)
    assert len(norms(encoder)) == left
    torch.testing.assert_close(encoder(IMAGES), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@torch.inference_mode()
def test_a_finer_map_and_the_statistics_of_all_processes_are_folded_likewise() -> None:
    encoder = trained("efficientnet_b0", output_stride=16)
    encoder.share_statistics()
    encoder.double()
    expected = encoder(IMAGES)
    fold_norms(encoder.backbone)
    assert norms(encoder) == []
    torch.testing.assert_close(encoder(IMAGES), expected)


@torch.inference_mode()
def test_a_convolutions_own_bias_stays_in_it() -> None:
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3, bias=True), nn.BatchNorm2d(5)).double().eval()
    backbone[1].running_mean.normal_()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = backbone(x)
    fold_norms(backbone)
    torch.testing.assert_close(backbone(x), expected)


@torch.inference_mode()
def test_weights_that_are_rounded_afterwards_lose_no_more_than_without() -> None:
    encoder = trained("efficientnet_b0")
    expected = copy.deepcopy(encoder).double()(IMAGES)

    def error(rounded: ImageEncoder) -> float:
        return float((rounded.bfloat16()(IMAGES).double() - expected).norm())

    plain = error(copy.deepcopy(encoder))
    fold_norms(encoder.backbone)
    assert error(encoder) < 1.1 * plain


def test_captions_are_written_with_folded_weights_that_are_rounded_last(tmp_path: Path) -> None:
    write_random_run(tmp_path)
    run = RunDirectory(tmp_path)
    plain, folded = (
        run.captioner(run.tokenizer(), torch.device("cpu"), dtype, packed=packed)
        for dtype, packed in ((torch.float32, False), (torch.bfloat16, True))
    )
    assert norms(plain)
    assert norms(folded) == []
    fold_norms(plain.encoder.backbone)
    for ours, exact in zip(folded.encoder.parameters(), plain.encoder.parameters(), strict=True):
        assert torch.equal(ours, exact.bfloat16())
