"""Muon: matrices and convolutions move by what is orthogonal in their gradients' momentum, all else by AdamW.

O rows of a matrix, or channels of a convolution; I columns, or inputs and places of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from efficap.models.linear import cpu_has_bfloat16

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # singular values come to 0.7 … 1.2 in five steps
RMS = 0.2  # of an update at a learning rate of 1, about AdamW's, so that both take the same learning rates


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), and AdamW for what is no matrix.

    One optimiser for both, as Lightning's loop has it. An update is scaled to the size of AdamW's (Liu et al., 2025,
    https://arxiv.org/abs/2502.16982). torch.optim.Muon takes matrices alone.

    Args:
        groups: of parameters, with ``lr`` and ``weight_decay``; ``is_orthogonal`` where Muon moves them.
        betas, eps: AdamW's.
        momentum: Muon's, 0 … 1; the gradient is looked up a step ahead (Nesterov).
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float, momentum: float
    ) -> None:
        # "fused" tells who leaves out a bad step that there is no kernel which does so by itself.
        defaults = {"betas": betas, "eps": eps, "momentum": momentum, "is_orthogonal": False, "fused": False}
        super().__init__(groups, defaults)

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
                for parameter in parameters:
                    self._move(parameter, group)
            elif parameters:
                self._move_by_adamw(parameters, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum_buffer"], group["momentum"]).flatten(1)  # (O, I)
        update = orthogonal(ahead).view_as(parameter).to(parameter.dtype)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * RMS * max(ahead.shape) ** 0.5)

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
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """About U V^T of the (O, I) matrix U S V^T, by Newton and Schulz's iteration; bfloat16 is exact enough for it."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda or cpu_has_bfloat16() else matrix.float()
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(STEPS):
        products = x @ x.T  # (O, O)
        x = torch.addmm(x, torch.addmm(products, products, products, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
