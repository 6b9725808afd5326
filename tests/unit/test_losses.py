"""The loss against torch's own cross-entropy, caption by caption."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from efficap.training.losses import caption_loss


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_cross_entropy_of_the_valid_tokens(label_smoothing: float) -> None:
    hidden, head = torch.randn(2, 3, 7, 16), torch.randn(50, 16)
    tokens, lengths = torch.randint(0, 50, (2, 3, 8)), torch.tensor([[8, 2, 5], [3, 0, 8]])
    logits, targets = [], []
    for b in range(2):
        for k in range(3):
            for t in range(1, int(lengths[b, k])):
                logits.append(head @ hidden[b, k, t - 1])
                targets.append(tokens[b, k, t])
    expected = F.cross_entropy(torch.stack(logits), torch.stack(targets), label_smoothing=label_smoothing)
    loss, count = caption_loss(hidden, head, tokens, lengths, label_smoothing=label_smoothing)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert count == len(targets)


def test_padding_does_not_change_the_loss() -> None:
    hidden, head = torch.randn(1, 2, 7, 16), torch.randn(50, 16)
    tokens, lengths = torch.randint(0, 50, (1, 2, 8)), torch.tensor([[8, 4]])
    loss, _ = caption_loss(hidden, head, tokens, lengths, label_smoothing=0.1)
    longer = F.pad(tokens, (0, 5), value=7)
    more_hidden = torch.cat([hidden, 100 * torch.randn(1, 2, 5, 16)], dim=2)
    padded_loss, _ = caption_loss(more_hidden, head, longer, lengths, label_smoothing=0.1)
    assert torch.equal(loss, padded_loss)


def test_a_batch_without_targets_has_a_loss_of_zero() -> None:
    hidden = torch.randn(1, 2, 7, 16, requires_grad=True)
    loss, count = caption_loss(
        hidden,
        torch.randn(50, 16),
        torch.zeros(1, 2, 8, dtype=torch.int64),
        torch.zeros(1, 2, dtype=torch.int64),
        label_smoothing=0.0,
    )
    loss.backward()
    assert loss == 0
    assert count == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
