"""Depthwise convolutions in float32 and under bfloat16 autocast against torch's in float32."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from efficap.models.depthwise import DepthwiseConv2d, use_fast_gradients


def gradients(conv: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """The result, and the gradients of the input and the weight, in float32."""
    x = x.clone().requires_grad_()
    y = conv(x)
    of_x, of_weight = torch.autograd.grad(y, (x, conv.weight), gradient.to(y.dtype))
    return y.float(), of_x.float(), of_weight.float()


def assert_gradients_agree(exact: nn.Conv2d, x: Tensor, gradient: Tensor) -> None:
    """In float32 and under bfloat16 with `x` in channels_last, against `exact` in float32."""
    x = x.contiguous(memory_format=torch.channels_last)
    expected = gradients(exact, x, gradient)
    for autocast, apart in ((False, 1e-6), (True, 0.01)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(DepthwiseConv2d(exact), x, gradient)
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape
            assert (one - other).norm() < apart * other.norm()


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "dilation"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (5, 1, 2, 1),
        (5, 2, 2, 1),
        (7, 2, 3, 1),
        (9, 1, 0, 1),
        (3, 1, 2, 2),
        (5, 1, 4, 2),
        (3, 1, 1, 3),
        (3, 2, 2, 2),  # this and those below in float32, at least in part
        (2, 1, 1, 1),
        ((1, 3), 1, (0, 1), 1),
        (3, 1, 4, 1),
    ],
)
def test_gradients_are_those_of_torch_but_for_rounding(
    kernel_size: Any, stride: int, padding: Any, dilation: int
) -> None:
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    exact = nn.Conv2d(8, 8, kernel_size, groups=8, bias=False, **settings)
    x = torch.randn(4, 8, 11, 12)
    assert_gradients_agree(exact, x, torch.randn_like(exact(x), memory_format=torch.channels_last))


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_gradients_with_padding_as_tensorflow_has_it_likewise(kernel_size: int, stride: int) -> None:
    exact = Conv2dSame(8, 8, kernel_size, stride, groups=8, bias=False)
    x = torch.randn(4, 8, 11, 11)
    assert_gradients_agree(exact, x, torch.randn_like(exact(x), memory_format=torch.channels_last))


@pytest.mark.parametrize("kernel_size", [5, 7])
def test_gradients_of_a_kernel_that_is_larger_than_its_picture_likewise(kernel_size: int) -> None:
    exact = nn.Conv2d(8, 8, kernel_size, padding=kernel_size // 2, groups=8, bias=False)
    x = torch.randn(4, 8, 3, 4)
    assert_gradients_agree(exact, x, torch.randn_like(x, memory_format=torch.channels_last))


def test_a_gradient_in_another_layout_gives_the_same() -> None:
    exact = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
    gradient = torch.randn(4, 8, 6, 6)  # as what torch makes of a mean over positions
    assert_gradients_agree(exact, torch.randn(4, 8, 6, 6), gradient)


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnetv2_b0"])
def test_a_backbone_keeps_its_weights_their_names_and_what_it_computes(name: str) -> None:
    torch.manual_seed(0)
    before = timm.create_model(name, num_classes=0, global_pool="")
    after = timm.create_model(name, num_classes=0, global_pool="")
    after.load_state_dict(before.state_dict())
    use_fast_gradients(after)
    replaced = sum(isinstance(module, DepthwiseConv2d) for module in after.modules())
    assert replaced == sum(isinstance(m, nn.Conv2d) and m.groups > 1 for m in before.modules())
    assert list(after.state_dict()) == list(before.state_dict())
    assert [p.shape for p in after.parameters()] == [p.shape for p in before.parameters()]
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(after.forward_features(x), before.forward_features(x))
