"""Matrix products by oneDNN are torch's own, with their gradients, and are taken where they are the faster ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from efficap.models import linear as module
from efficap.models.linear import (
    Linear,
    bfloat16_is_slow,
    cpu_has_bfloat16,
    gradient_product,
    linear,
    mkl_is_slow,
    mkl_is_slow_in_training,
)

ZEN3 = {"cpu_name": "AMD EPYC 7763 64-Core Processor", "avx2": True, "avx512_f": False}
ZEN4 = {"cpu_name": "AMD EPYC 9654 96-Core Processor", "avx2": True, "avx512_f": True}
ASKED = (mkl_is_slow, mkl_is_slow_in_training, cpu_has_bfloat16)


@pytest.fixture(autouse=True)
def _ask_anew() -> Iterator[None]:
    for asked in ASKED:
        asked.cache_clear()
    yield
    for asked in ASKED:
        asked.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what oneDNN was given, on a processor for which it is chosen."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    found: list[tuple[int, ...]] = []

    def product(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(tuple(x.shape))
        return plain(x, *rest)

    plain = module.product
    monkeypatch.setattr(module, "product", product)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN4, raising=False)
    return found


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (1, 12)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_are_torchs(
    calls: list[tuple[int, ...]], shape: tuple[int, ...], has_bias: bool
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape), torch.randn(7, 12), torch.randn(7) if has_bias else None]
    slope = torch.randn(*shape[:-1], 7)
    sides = []
    for function in (linear, F.linear):
        x, weight, bias = (t if t is None else t.clone().requires_grad_() for t in given)
        y = function(x, weight, bias)
        y.backward(slope)
        sides.append([y, *(t.grad for t in (x, weight, bias) if t is not None)])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert len(calls) == 3, "forward, and the gradients of input and weight"


def test_strides_do_not_matter(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(12, 5).T, torch.randn(12, 7).T
    torch.testing.assert_close(linear(x, weight), x @ weight.T)
    assert len(calls) == 1


def test_what_is_frozen_gets_no_gradient(calls: list[tuple[int, ...]]) -> None:
    layer = Linear(12, 7).requires_grad_(False)
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, 12))
    assert len(calls) == 2


def test_a_gradient_is_the_product_of_its_matrices(calls: list[tuple[int, ...]]) -> None:
    x, y = torch.randn(12, 5).T, torch.randn(12, 7)
    torch.testing.assert_close(gradient_product(x, y), x @ y)
    assert len(calls) == 1


def test_a_gradient_of_nothing_is_zero(calls: list[tuple[int, ...]]) -> None:
    assert torch.equal(gradient_product(torch.empty(5, 0), torch.empty(0, 7)), torch.zeros(5, 7))
    assert calls == []


def test_without_avx_512_only_what_has_no_gradient_is_onednns(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: ZEN3, raising=False)
    layer, x = Linear(12, 7), torch.randn(3, 12)
    expected = F.linear(x, layer.weight, layer.bias)
    layer(x).sum().backward()
    torch.testing.assert_close(gradient_product(x.T, expected), x.T @ expected)
    assert calls == []
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert calls == [(3, 12)]


def test_bfloat16_and_nothing_are_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    layer = Linear(12, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 12)).dtype == torch.bfloat16
    assert layer(torch.empty(0, 12)).shape == (0, 7)
    assert calls == []


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        (ZEN4, (True, True)),
        (ZEN3, (True, False)),
        ({"cpu_name": "Intel(R) Xeon(R) Platinum 8488C", "avx2": True, "avx512_f": True}, (False, False)),
        ({}, (False, False)),
    ],
)
def test_it_is_chosen_for_amds_processors_and_in_training_for_those_with_avx_512(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], slow: tuple[bool, bool]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert (mkl_is_slow(), mkl_is_slow_in_training()) == slow


@pytest.mark.parametrize(
    ("capabilities", "slow"),
    [
        ({"avx512_f": True}, True),  # for which oneDNN emulates bfloat16
        ({"avx512_f": True, "avx512_bf16": True}, False),
        ({"amx_bf16": True}, False),
    ],
)
def test_bfloat16_is_slow_without_its_products(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], slow: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert bfloat16_is_slow() == slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_give_what_the_plain_ones_do(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN does not order bfloat16 weights on this CPU")
    capabilities = ZEN4 | {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    torch.manual_seed(0)
    layer, x = Linear(96, 70).to(dtype), torch.randn(2, 3, 96, dtype=dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    layer.pack()
    layer.pack()  # once more changes nothing
    assert layer.weight.is_mkldnn
    torch.testing.assert_close(layer(x), expected)


def test_weights_stay_where_another_order_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel"}, raising=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = Linear(12, 7).to(dtype)
        layer.pack()
        assert not layer.weight.is_mkldnn
