"""Muon: matrices and convolutions move by what is orthogonal in their gradients' momentum, all else by AdamW.

O rows of a matrix, or channels of a convolution; I columns, or inputs and places of its kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from efficap.models.linear import cpu_has_bfloat16

# Of a x + b x^3 + c x^5, one after the other. Each is the one that brings what those before it leave of singular values
# between 0.003 and 1 nearest to 1 (Amsel et al., 2025, https://arxiv.org/abs/2505.16932), with 2 % to spare for
# rounding: 0.78 … 1.22 in four steps, where Jordan's take five for 0.68 … 1.20.
COEFFICIENTS = (
    (8.3837, -24.7659, 18.3571),
    (3.9690, -2.8424, 0.5167),
    (3.4626, -2.4982, 0.4802),
    (2.4910, -1.7800, 0.4060),
)
AT_ONCE = 2**22  # elements of matrices of a shape that are multiplied together, of more than one matrix
RMS = 0.2  # of an update at a learning rate of 1, about AdamW's, so that both take the same learning rates


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), and AdamW for what is no matrix.

    One optimiser for both, as Lightning's loop has it. An update is scaled to the size of AdamW's (Liu et al., 2025,
    https://arxiv.org/abs/2502.16982). torch.optim.Muon takes matrices alone.

    Args:
        groups: of parameters, with ``lr`` and ``weight_decay``; ``is_orthogonal`` where Muon moves them.
        betas, eps: AdamW's.
        momentum: Muon's, 0 … 1; the gradient is looked up a step ahead (Nesterov).
        fused: as torch's fused optimisers, a step changes nothing where the attribute ``found_inf``, a tensor of 0 or 1
            on the device that a caller may set, is 1; nobody waits for it.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        fused: bool = False,
    ) -> None:
        defaults = {"betas": betas, "eps": eps, "momentum": momentum, "is_orthogonal": False, "fused": fused}
        super().__init__(groups, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimiser's; torch leaves steps on the CPU unless they are a fused kernel's of its own."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "step" in state:
                state["step"] = state["step"].to(parameter.device, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As any optimiser's; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["is_orthogonal"]:
                for alike in _alike(parameters):
                    self._move(alike, group)
            elif parameters:
                self._move_by_adamw(parameters, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        lr: float | Tensor = group["lr"]
        if (bad := self._found_inf()) is not None:
            gradients = [torch.where(bad > 0, *pair) for pair in zip(buffers, gradients, strict=True)]
            lr = lr * (1 - bad)
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
        matrices = torch.stack([x.flatten(1).to(_product_dtype(x)) for x in ahead])  # (n, O, I)
        updates = orthogonal(matrices).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        updates *= -RMS * max(matrices.shape[1:]) ** 0.5 * lr
        moves = [update.view_as(p) for update, p in zip(updates, parameters, strict=True)]
        torch._foreach_add_(parameters, moves)

    def _found_inf(self) -> Tensor | None:
        return getattr(self, "found_inf", None)

    def _move_by_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            found_inf=self._found_inf(),
        )


def _alike(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Those that are matrices of the same shape, together: small ones are mostly calls otherwise."""
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
    for (rows, columns), alike in by_shape.items():
        count = max(1, AT_ONCE // (rows * columns))
        yield from (alike[start : start + count] for start in range(0, len(alike), count))


def _product_dtype(x: Tensor) -> torch.dtype:
    """bfloat16 is exact enough for `orthogonal`."""
    return torch.bfloat16 if (_gpu_has_bfloat16() if x.is_cuda else cpu_has_bfloat16()) else torch.float32


@functools.cache
def _gpu_has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of each of (n, O, I) matrices U S V^T, by Newton and Schulz's iteration.

    Several steps at a time are polynomials of X X^T, which is (O, O), and multiplied by the (O, I) X once: as many as
    cost least. In bfloat16 they are two, as with more what it rounds would grow.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1
    rows, columns = x.shape[1:]
    # Of a product of two (O, O): a step by itself takes 1 + 2 I/O, n of them together 2 I/O + 4 n - 3.
    together = 2 if x.dtype == torch.bfloat16 else 1 if 2 * columns < 3 * rows else len(COEFFICIENTS)
    for start in range(0, len(COEFFICIENTS), together):
        first, *others = COEFFICIENTS[start : start + together]
        gram = x @ x.mT  # (n, O, O)
        once = whole = _polynomial(gram, *first)
        for step in others:
            gram = once @ gram @ once
            once = _polynomial(gram, *step)
            whole = once @ whole
        x = whole @ x
    return x.mT if is_tall else x


def _polynomial(y: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b y + c y^2 of (n, O, O) symmetric matrices."""
    result = torch.baddbmm(y, y, y, beta=b, alpha=c)
    result.diagonal(dim1=1, dim2=2).add_(a)
    return result
