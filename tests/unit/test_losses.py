"""The loss against torch's own cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from efficap.training import losses
from efficap.training.losses import caption_loss, summed_cross_entropy


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [50, 350, 10_000], ids=["one-by-one", "in-parts", "all"])
def test_loss_and_gradients_are_those_of_torch(
    label_smoothing: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * at_once)
    monkeypatch.setattr(losses, "FLOATS_AT_ONCE", {"cpu": at_once // 2})
    monkeypatch.setattr(losses, "WORDS_AT_ONCE", 20)
    hidden, head = torch.randn(23, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets = torch.randint(0, 50, (23,))
    expected = F.cross_entropy(hidden @ head.T, targets, label_smoothing=label_smoothing)
    gradients = torch.autograd.grad(3 * expected, (hidden, head))
    loss = caption_loss(hidden, head, targets, label_smoothing=label_smoothing)
    assert torch.allclose(loss, expected, atol=1e-5)
    for one, other in zip(torch.autograd.grad(3 * loss, (hidden, head)), gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_each_state_counts_as_much_as_its_weight_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * 350)
    hidden, head = torch.randn(23, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets, weights = torch.randint(0, 50, (23,)), torch.randn(23)
    weights[3] = 0
    each = F.cross_entropy(hidden @ head.T, targets, label_smoothing=0.1, reduction="none")
    expected = weights @ each
    total = summed_cross_entropy(hidden, head, targets, weights, label_smoothing=0.1)
    torch.testing.assert_close(total, expected)
    for one, other in zip(
        torch.autograd.grad(total, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_gradients_the_loss_is_the_same_for_a_third_of_the_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, head = torch.randn(23, 16), torch.randn(50, 16).requires_grad_()
    targets = torch.randint(0, 50, (23,))
    products: list[int] = []

    def counted(multiply: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def product(*matrices: torch.Tensor) -> torch.Tensor:
            products.append(1)
            return multiply(*matrices)

        return product

    monkeypatch.setattr(losses, "linear", counted(F.linear))
    monkeypatch.setattr(losses, "gradient_product", counted(torch.matmul))
    expected = caption_loss(hidden, head, targets, label_smoothing=0.1)
    assert len(products) == 3
    for mode in (torch.no_grad, torch.inference_mode):
        products.clear()
        with mode():
            assert torch.equal(caption_loss(hidden, head, targets, label_smoothing=0.1), expected)
        assert len(products) == 1


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, head = torch.randn(500, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets = torch.randint(0, 50, (500,))
    expected = caption_loss(hidden, head, targets, label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = caption_loss(hidden, head, targets, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 2e-3 * abs(expected)  # a sum in bfloat16 would be off by up to 4e-3
    (gradient,) = torch.autograd.grad(loss, head)
    assert gradient.dtype == torch.float32
    assert torch.allclose(gradient, torch.autograd.grad(expected, head)[0], atol=2e-3)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_in_bfloat16_weights_and_shared_states_count_as_in_float32(label_smoothing: float) -> None:
    hidden, head = torch.randn(300, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    targets, weights = torch.randint(-1, 50, (300, 3)), torch.randn(300)
    targets[7] = -1
    weights[(targets < 0).all(dim=1)] = 0
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            total = summed_cross_entropy(hidden, head, targets, weights, label_smoothing=label_smoothing)
        found.append((total, *torch.autograd.grad(total, (hidden, head))))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    hidden, head = torch.randn(0, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    loss = caption_loss(hidden, head, torch.zeros(0, dtype=torch.int64), label_smoothing=0.1)
    loss.backward()
    assert loss == 0
    assert torch.equal(head.grad, torch.zeros_like(head))


def test_in_bfloat16_what_all_words_have_in_common_costs_no_precision() -> None:
    """GPT-2's logits lie around -100, where bfloat16 has steps of half a nat."""
    hidden = F.layer_norm(torch.randn(500, 64), (64,)) + 3.0
    own = 0.05 * torch.randn(300, 64)
    head = (own - 0.5).requires_grad_()
    assert float((hidden @ head.detach().T).mean()) < -90
    targets = torch.randint(0, 300, (500,))
    losses_of_each = []
    for weight, dtype in ((head.double(), torch.float64), (head, torch.float32)):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            x = hidden.to(dtype).requires_grad_()
            loss = caption_loss(x, weight, targets, label_smoothing=0.1)
        losses_of_each.append((float(loss.detach()), *torch.autograd.grad(loss, (x, head))))
    (exact, *wanted), (found, *gradients) = losses_of_each
    assert abs(found - exact) < 1e-3
    for one, other in zip(gradients, wanted, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()
