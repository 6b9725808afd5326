"""SiLU against torch's."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from efficap.models.activation import SiLU, copy_no_inputs


class Calls(TorchDispatchMode):
    """Names of the operators that are called, autograd's own calls among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_result_and_gradient_are_those_of_torch_and_the_input_stays() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    before = x * 1  # no leaf, which nothing may overwrite anyway
    kept = before.detach().clone()
    y = SiLU(inplace=True)(before)
    assert torch.equal(before, kept)
    assert torch.equal(y, nn.SiLU()(x))
    gradient = torch.randn(3, 5)
    (found,) = torch.autograd.grad(y, x, gradient)
    (expected,) = torch.autograd.grad(nn.SiLU()(x), x, gradient)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_without_gradients_it_is_in_place_where_it_was() -> None:
    x = torch.randn(3, 5)
    assert SiLU(inplace=True)(x) is x
    assert SiLU(inplace=False)(x) is not x


def test_no_input_of_a_backbone_is_copied() -> None:
    backbone = timm.create_model("efficientnet_b0", num_classes=0, global_pool="")
    copy_no_inputs(backbone)
    assert sum(isinstance(layer, SiLU) for layer in backbone.modules()) == 49
    with Calls() as calls:
        backbone(torch.randn(2, 3, 64, 64))
    assert not calls.names & {"aten::clone", "aten::silu_"}
