"""The loss of captions.

B images, K captions of each, N positions of the memory, D width, V vocabulary, n valid targets of the batch, c of them
whose logits are held at a time, r of these in float32; J targets of each, 1 but where captions share a hidden state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from efficap.batch import CaptionBatch
from efficap.models.captioner import CaptionModel
from efficap.models.linear import centred, gradient_product, linear
from efficap.ranks import summed, world_size
from efficap.training.augment import choose_hidden, drop_tokens, hide_words, read_once

LOGITS_AT_ONCE = 2**27  # bytes, of those that are held
FLOATS_AT_ONCE = {"cpu": 2**20}  # elements of them in float32: a core's cache has them for the next pass
WORDS_AT_ONCE = 4096  # of the output layer's gradient, likewise


def batch_loss(
    captioner: CaptionModel,
    batch: CaptionBatch,
    *,
    label_smoothing: float,
    token_dropout: float = 0.0,
    hidden_captions: float = 0.0,
) -> Tensor:
    """`caption_loss` of a batch, its pictures encoded once for all their captions.

    Args:
        token_dropout: 0 … 1, share of the words read, not of those to be written, that are random.
        hidden_captions: 0 … 1, share of the captions of which no word is read.
    """
    memory = captioner.encode(batch.images)  # (B, N, D)
    read, places, targets = batch.tokens[..., :-1], batch.places, batch.targets  # (B, K, T - 1), (n,) each
    if token_dropout:
        read = drop_tokens(read, token_dropout, captioner.decoder.wte.num_embeddings)
    if hidden_captions:
        is_hidden = choose_hidden(read, hidden_captions)  # (B, K)
        read = hide_words(read, is_hidden)
        if read.is_cpu:  # a GPU would have to be waited for, which alone knows how many places are left
            read, places, targets = read_once(read, places, targets, is_hidden)
    return memory_loss(captioner, memory, read, places, targets, label_smoothing=label_smoothing)


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
        places: (n,) int64, ascending, of the flattened `read`, those that have a next token.
        targets: (n,) or (n, J) int64, what follows them, as of `caption_loss`.
    """
    hidden = captioner.hidden_states(memory, read, places)  # (n, D)
    return caption_loss(hidden, captioner.decoder.wte.weight, targets, label_smoothing=label_smoothing)


def caption_loss(hidden: Tensor, head: Tensor, targets: Tensor, *, label_smoothing: float) -> Tensor:
    """Cross-entropy of each next token, the mean over those of the batch; 0 where there is none.

    Args:
        hidden: (n, D), what the decoder made of the tokens before.
        head: (V, D), the output layer's weight.
        targets: (n,) int64; or (n, J), the next token of each of up to J captions that share a hidden state, -1 for
            none.
        label_smoothing: 0 … 1, share of the target spread over the vocabulary (Szegedy et al., 2016).

    Returns:
        The loss in nats a token, float32.
    """
    if targets.ndim == 1:
        weights, count = hidden.new_ones(len(targets), dtype=torch.float32), max(1, len(targets))
    else:
        weights = (targets >= 0).sum(dim=1, dtype=torch.float32)
        count = weights.sum().clamp_min(1)
    return summed_cross_entropy(hidden, head, targets, weights, label_smoothing=label_smoothing) / count


def summed_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, *, label_smoothing: float
) -> Tensor:
    """Cross-entropy of what follows each hidden state, times its weight, summed, from a part of the logits at a time.

    Args:
        hidden, head, targets, label_smoothing: as of `caption_loss`; the targets of a hidden state count alike.
        weights: (n,) float32, of either sign; 0 where there is no target.

    Returns:
        Nats, float32.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    # a Function is not told, and would make gradients of what could have them
    if not torch.is_grad_enabled():
        hidden, head = hidden.detach(), head.detach()
    if targets.ndim == 1:
        targets = targets[:, None]
    with torch.autocast(device, enabled=False):
        total: Tensor = _SummedCrossEntropy.apply(hidden.to(dtype), head, targets, weights, label_smoothing)
    return total


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
    total, count = summed(torch.stack([tokens * mean.detach(), mean.new_full((), tokens)]))
    return mean * (tokens * world_size() / count), total / count


class _SummedCrossEntropy(Function):
    """The gradient is made with the loss, from a part of the logits at a time, up to `LOGITS_AT_ONCE`.

    With a share e of the target spread out, a token's loss is logsumexp(z) - (1 - e) z_t - e mean(z), and its gradient
    softmax(z) - (1 - e) [t] - e / V. What is spread out needs no logits: their mean is what a mean word's weight makes
    of the hidden state. torch's own linear_cross_entropy (2.15) knows no smoothing, and sums in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, smoothing: float
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        weight, _ = centred(head, hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        weighed = (hidden * weights[:, None]).to(hidden.dtype)  # (n, D)
        if smoothing:
            # a part at a time, of which a CPU makes copies in float32
            sums = [part.sum(dim=0, dtype=torch.float32) for part in weight.split(WORDS_AT_ONCE)]
            mean_word = torch.stack(sums).sum(dim=0) / len(weight)  # (D,)
            all_hidden = weighed.sum(dim=0, dtype=torch.float32)  # (D,)
            total -= smoothing * mean_word.dot(all_hidden)
        of_hidden: list[Tensor] = []
        of_head = torch.empty_like(head) if needs_gradient else head
        parts = math.ceil(len(hidden) * len(head) * weight.element_size() / LOGITS_AT_ONCE)
        rows = max(1, math.ceil(len(hidden) / max(1, parts)))
        together = zip(*(x.split(rows) for x in (hidden, weighed, targets, weights)), strict=True)
        for h, hw, t, w in together:
            z = linear(h, weight)  # (c, V)
            total += _summed(z, t, w, smoothing, needs_gradient)
            if not needs_gradient:
                continue
            for part, slope in zip(of_head.split(WORDS_AT_ONCE), z.split(WORDS_AT_ONCE, dim=1), strict=True):
                of_part = gradient_product(slope.T, hw)  # (up to WORDS_AT_ONCE, D)
                if of_hidden:
                    part.add_(of_part)
                elif smoothing:
                    torch.sub(of_part, all_hidden, alpha=smoothing / len(head), out=part)
                else:
                    part.copy_(of_part)
            of_hidden.append(gradient_product(z, weight))
        if needs_gradient:  # not by save_for_backward: large as they are, they are scaled in place, once
            ctx.of_hidden, ctx.of_head = torch.cat(of_hidden), of_head
            if smoothing:
                ctx.of_hidden.sub_(mean_word, alpha=smoothing)
            ctx.of_hidden.mul_(weights[:, None])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_head = ctx.of_hidden, ctx.of_head
        del ctx.of_hidden, ctx.of_head
        return of_hidden.mul_(gradient), of_head.mul_(gradient), None, None, None


def _summed(z: Tensor, targets: Tensor, weights: Tensor, smoothing: float, needs_gradient: bool) -> Tensor:
    """The loss of (c, V) logits, (c, J) targets and (c,) weights, summed, without what is spread out.

    With `needs_gradient` the logits become their slopes at a weight of 1, also without it.
    """
    total = torch.zeros((), device=z.device)
    rows = max(1, FLOATS_AT_ONCE.get(z.device.type, 2**25) // z.shape[1])
    for part, t, w in zip(z.split(rows), targets.split(rows), weights.split(rows), strict=True):
        x = part.float()  # (r, V)
        share, t = (t >= 0).to(x.dtype), t.clamp_min(0)  # (r, J) each
        share = (1 - smoothing) * share / share.sum(dim=1, keepdim=True).clamp_min(1)
        of_targets = (share * x.gather(1, t)).sum(dim=1)  # (r,)
        largest, slopes = x.amax(dim=1), x.softmax(dim=1)
        log_sums = largest - slopes.amax(dim=1).log()  # (r,), with one exponential a logit
        total += (w * (log_sums - of_targets)).sum()
        if needs_gradient:
            part.copy_(slopes.scatter_add_(1, t, -share))
    return total
