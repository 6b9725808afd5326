"""Attention by matrix products on a CPU, for a gradient in bfloat16 and for few queries, against torch's in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from efficap.models import attention as module
from efficap.models.attention import attention

B, H, T, N, D = 2, 3, 7, 5, 16


@pytest.fixture
def torch_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What torch's own attention was given."""
    calls: list[torch.dtype] = []

    def counted(q: Tensor, *rest: Any, **options: Any) -> Tensor:
        calls.append(q.dtype)
        return plain(q, *rest, **options)

    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


def inputs(dtype: torch.dtype, keys: int) -> list[Tensor]:
    torch.manual_seed(0)
    exact = [torch.randn(B, H, length, D).bfloat16() for length in (T, keys, keys)]
    return [x.to(dtype).requires_grad_() for x in exact]


@pytest.mark.parametrize(
    ("keys", "options"),
    [
        (N, {}),
        (T, {"is_causal": True}),
        (1 + T, {"mask": torch.ones(T, 1 + T, dtype=torch.bool).tril(1)}),
    ],
    ids=["all", "causal", "masked"],
)
def test_result_and_gradients_are_those_of_torch(
    keys: int, options: dict[str, Any], torch_calls: list[torch.dtype]
) -> None:
    q, k, v = inputs(torch.bfloat16, keys)
    found = attention(q, k, v, **options)
    assert not torch_calls
    exact = inputs(torch.float64, keys)
    expected = attention(*exact, **options)
    assert torch_calls == [torch.float64]
    slope = torch.randn(B, H, T, D)
    assert torch.allclose(found.double(), expected, atol=0.03)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), slope.bfloat16()),
        torch.autograd.grad(expected, exact, slope.bfloat16().double()),
        strict=True,
    ):
        assert float((one - other).norm() / other.norm()) < 0.01


def test_dropout_leaves_out_its_share_of_the_weights() -> None:
    q, k, _ = inputs(torch.bfloat16, 400)
    torch.manual_seed(0)
    summed = attention(0 * q, k, torch.ones(B, H, 400, D).bfloat16(), dropout=0.25)  # equal weights
    summed = summed.detach().float()
    assert abs(float(summed.mean()) - 1) < 0.02
    assert float(summed.std()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_few_queries_of_a_decoding_see_what_torch_lets_them_see(
    dtype: torch.dtype, torch_calls: list[torch.dtype]
) -> None:
    visible = torch.rand(B, 1, T, N, generator=torch.Generator().manual_seed(0)) < 0.7
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    found = attention(*inputs(dtype, N), mask=mask.to(dtype))
    assert not torch_calls
    expected = F.scaled_dot_product_attention(*inputs(torch.float64, N), attn_mask=visible)
    assert torch.allclose(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("case", ["many-queries", "float32", "long"])
def test_torch_is_asked_where_products_gain_nothing(
    case: str, torch_calls: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = inputs(torch.float32 if case == "float32" else torch.bfloat16, N)
    monkeypatch.setattr(module, "SHORT", T * N - (case == "long"))
    monkeypatch.setattr(module, "FEW", T - 1)
    with torch.set_grad_enabled(case != "many-queries"):
        attention(q, k, v)
    assert len(torch_calls) == 1
