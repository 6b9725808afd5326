"""Squeeze and excitation against timm's."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite as TimmSqueezeExcite
from torch import nn

from efficap.models.squeeze_excite import SqueezeExcite, keep_layout


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_the_result_and_all_gradients_are_those_of_timm(memory_format: torch.memory_format) -> None:
    theirs = TimmSqueezeExcite(12, act_layer=nn.SiLU)
    x = torch.randn(3, 12, 5, 7).contiguous(memory_format=memory_format).requires_grad_()
    gradient = torch.randn(3, 12, 5, 7)
    results = [layer(x) for layer in (theirs, SqueezeExcite(theirs))]
    assert torch.equal(results[0], results[1])
    wanted = [x, *theirs.parameters()]
    for one, other in zip(*(torch.autograd.grad(y, wanted, gradient) for y in results), strict=True):
        torch.testing.assert_close(one, other)


def test_the_gradient_of_pictures_has_their_layout() -> None:
    layer = SqueezeExcite(TimmSqueezeExcite(12, act_layer=nn.SiLU))
    x = torch.randn(3, 12, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    (of_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert of_x.is_contiguous(memory_format=torch.channels_last)


def test_a_backbone_keeps_its_weights_their_names_and_what_it_computes() -> None:
    before = timm.create_model("efficientnet_b0", num_classes=0, global_pool="").eval()
    after = timm.create_model("efficientnet_b0", num_classes=0, global_pool="").eval()
    after.load_state_dict(before.state_dict())
    keep_layout(after)
    assert sum(isinstance(layer, SqueezeExcite) for layer in after.modules()) == 16
    assert list(after.state_dict()) == list(before.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(after.forward_features(x), before.forward_features(x))
