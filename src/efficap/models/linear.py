"""Matrix products by oneDNN, on the CPUs for which torch's own way of computing them is slow.

torch leaves those of float32 to MKL, which on AMD's processors makes no use of AVX-512; oneDNN, which torch has for its
convolutions, was seen to be twice as fast there, and on those without AVX-512 for few rows or many outputs, but not in
gradients (docs/benchmarks.md). Those of bfloat16 are oneDNN's anyway. A decoding multiplies by the same weights again
and again, whose order oneDNN changes each time unless it was done before.

R rows, I inputs, O outputs; V words, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

WORDS = 4096  # at most, of a vocabulary, whose mean stands for that of all
CACHED = 2**20  # elements that a core's cache holds
ROWS = 64  # of a decoding's step, about; a packed weight's order is right for any number


class Linear(nn.Linear):
    """torch's linear layer, with `linear`'s arithmetic."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) -> (…, O)."""
        return linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Keep the weight as `packed` from now on, for inference alone."""
        self.weight = nn.Parameter(packed(self.weight), requires_grad=False)


def packed(weight: Tensor) -> Tensor:
    """An (O, I) weight in the order that oneDNN multiplies it in, where that is faster: opaque but to `linear`.

    Returns:
        It, or the weight as it is; without a gradient.
    """
    weight = weight.detach()
    by_onednn = {torch.float32: mkl_is_slow, torch.bfloat16: cpu_has_bfloat16}.get(weight.dtype)
    if weight.device.type != "cpu" or weight.is_mkldnn or not (by_onednn and by_onednn() and _has_operator()):
        return weight
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return reordered


def centred(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """An output layer's (V, D) weight for a `dtype` that rounds: without what its words have in common.

    GPT-2's logits lie around -100, where bfloat16 knows steps of half a nat. To take the same (D,) from every word's
    weight takes the same from all logits: it changes no probability, and leaves them where the steps are small.

    Returns:
        The weight in `dtype`, and what was taken, in float32; None where `dtype` has at least 32 bits.
    """
    if torch.finfo(dtype).bits >= 32:
        return weight.to(dtype), None
    common = weight[:: -(-len(weight) // WORDS)].float().mean(dim=0)  # (D,)
    rest = torch.empty_like(weight, dtype=dtype)
    rows = len(weight) if weight.is_cuda else max(1, CACHED // weight.shape[1])
    for part, whole in zip(rest.split(rows), weight.split(rows), strict=True):
        torch.sub(whole, common, out=part)
    return rest, common


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(…, I) with an (O, I) weight -> (…, O), as `torch.nn.functional.linear` to float32's rounding."""
    if weight.is_mkldnn:
        return product(x, weight, bias)
    learns = torch.is_grad_enabled()
    is_slow = mkl_is_slow_in_training if learns else mkl_is_slow
    if not (_is_float32_on_cpu(x) and is_slow() and x.numel()):
        return F.linear(x, weight, bias)
    y: Tensor = (_Linear.apply if learns else product)(x, weight, bias)
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by oneDNN, without a gradient; strides do not matter."""
    # torch's compiler writes calls of this operator; it has no other name.
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def gradient_product(x: Tensor, y: Tensor) -> Tensor:
    """(…, I) @ (I, O), for a loss that makes its own gradients."""
    by_onednn = x.numel() and _is_float32_on_cpu(x) and mkl_is_slow_in_training()
    return product(x, y.T) if by_onednn else x @ y


@functools.cache
def mkl_is_slow() -> bool:
    """Whether this is a processor of AMD, of the last ten years, and a torch that has what `product` calls."""
    capabilities = _capabilities()
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD")
    return _has_operator() and is_amd and bool(capabilities.get("avx2"))


@functools.cache
def mkl_is_slow_in_training() -> bool:
    """Whether `mkl_is_slow` for products that learn, too.

    Without AVX-512 oneDNN loses in their gradients, where it puts turned matrices in order first, what it gains before.
    """
    return mkl_is_slow() and bool(_capabilities().get("avx512_f"))


def _has_operator() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16; on others torch's products in it are slower than in float32."""
    return any(_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


def bfloat16_is_slow() -> bool:
    """Whether this processor is known not to multiply in bfloat16, so that torch emulates it."""
    if _capabilities():
        return not cpu_has_bfloat16()
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # true of AVX-512 without these products, too


def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # an older torch


def _is_float32_on_cpu(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = product(gradient, weight.T) if ctx.needs_input_grad[0] else None  # (…, I)
        rows = gradient.flatten(0, -2)  # (R, O)
        of_weight = product(rows.T, x.flatten(0, -2).T) if ctx.needs_input_grad[1] else None  # (O, I)
        return of_x, of_weight, rows.sum(dim=0) if ctx.needs_input_grad[2] else None
