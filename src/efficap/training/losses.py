"""The loss of captions.

B images, K captions of each, N positions of the memory, D width, V vocabulary, n valid targets of the batch, c of them
at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from efficap.batch import CaptionBatch
from efficap.models.captioner import CaptionModel
from efficap.models.linear import linear
from efficap.ranks import summed, world_size
from efficap.training.augment import drop_tokens

LOGITS_AT_ONCE = 2**25  # 128 MiB in float32


def batch_loss(
    captioner: CaptionModel, batch: CaptionBatch, *, label_smoothing: float, token_dropout: float = 0.0
) -> Tensor:
    """`caption_loss` of a batch, its pictures encoded once for all their captions.

    Args:
        token_dropout: 0 … 1, share of the words read, not of those to be written, that are random.
    """
    memory = captioner.encode(batch.images)  # (B, N, D)
    read = batch.tokens[..., :-1]  # (B, K, T - 1)
    if token_dropout:
        read = drop_tokens(read, token_dropout, captioner.decoder.wte.num_embeddings)
    return memory_loss(captioner, memory, read, batch.places, batch.targets, label_smoothing=label_smoothing)


def memory_loss(
    captioner: CaptionModel,
    memory: Tensor,
    read: Tensor,
    places: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float,
) -> Tensor:
    """`caption_loss` of captions that are read with a memory, be it of their pictures or not.

    Args:
        memory: (B, N, D).
        read: (B, K, T) int64, the captions.
        places: (n,) int64, of the flattened `read`, those that have a next token.
        targets: (n,) int64, these next tokens.
    """
    hidden = captioner.hidden_states(memory, read, places)  # (n, D)
    return caption_loss(hidden, captioner.decoder.wte.weight, targets, label_smoothing=label_smoothing)


def caption_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy of each next token, the mean over those of the batch; 0 where there is none.

    Args:
        hidden: (n, D), what the decoder made of the tokens before.
        head: (V, D), the output layer's weight.
        targets: (n,) int64.
        label_smoothing: 0 … 1, share of the target spread over the vocabulary (Szegedy et al., 2016).

    Returns:
        The loss in nats a token, float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    if (
        not torch.is_grad_enabled()
    ):  # a Function is not told, and would make gradients of what could have them
        hidden, head = hidden.detach(), head.detach()
    with torch.autocast(device, enabled=False):
        total: Tensor = _SummedCrossEntropy.apply(hidden.to(dtype), head, targets, label_smoothing)
    return total / max(1, len(targets))


def shared_loss(mean: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """What a process is to train on so that the mean of all processes' gradients is that over all their tokens.

    Args:
        mean: the loss over this process's own tokens.
        tokens: of this process.

    Returns:
        The loss to train on, and the mean over all tokens, to be shown.
    """
    if world_size() == 1:
        return mean, mean
    total, count = summed(torch.stack([tokens * mean.detach(), mean.new_tensor(tokens)]))
    return mean * (tokens * world_size() / count), total / count


class _SummedCrossEntropy(Function):
    """The gradient is made with the loss, from a part of the logits at a time, so that they are never all held.

    With a share e of the target spread out, a token's loss is logsumexp(z) - (1 - e) z_t - e mean(z), and its gradient
    softmax(z) - (1 - e) [t] - e / V. torch's own linear_cross_entropy (2.15) knows no smoothing, and sums in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        weight = head.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        of_hidden: list[Tensor] = []
        of_head: Tensor | None = None
        for h, t in zip(
            *(x.split(max(1, LOGITS_AT_ONCE // len(head))) for x in (hidden, targets)), strict=True
        ):
            z = linear(h, weight).float()  # (c, V)
            log_sums = z.logsumexp(dim=1, keepdim=True)  # (c, 1)
            of_target = z.gather(1, t[:, None])  # (c, 1)
            total += (log_sums - (1 - smoothing) * of_target).sum()
            if smoothing:
                total -= smoothing * z.mean(dim=1).sum()
            if not needs_gradient:
                continue
            z.sub_(log_sums).exp_().sub_(smoothing / len(head))
            z.scatter_add_(1, t[:, None], z.new_full((len(t), 1), smoothing - 1))
            slope = z.to(hidden.dtype)  # (c, V), of the loss by the logits
            of_hidden.append(linear(slope, weight.T))
            part = linear(slope.T, h.T)  # (V, D)
            of_head = part.to(head.dtype) if of_head is None else of_head.add_(part)
        if of_head is not None:
            ctx.save_for_backward(torch.cat(of_hidden), of_head)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        of_hidden, of_head = ctx.saved_tensors
        return of_hidden * gradient, of_head * gradient, None, None
