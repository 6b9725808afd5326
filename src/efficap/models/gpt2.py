"""GPT-2 with one cross-attention sublayer in every block, between self-attention and MLP.

B images, G rows of each (K captions in training, beams in decoding), R = B * G rows, image-major; T tokens,
N positions of the memory, D width, H heads of width d, L layers, V vocabulary.

Modules carry transformers' names (``h.0.attn.c_attn`` …), so that weights map one to one; transformers stores
these matrices as (in, out), this module as torch's Linear does, (out, in).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from efficap.errors import InputError
from efficap.models.attention import attention
from efficap.models.cache import DecodingCache, KeyValue
from efficap.models.linear import Linear, centred, linear, packed
from efficap.models.packing import Packing


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, gelu_new, output tied to the embedding.

    Args:
        vocab_size: V.
        n_positions: the longest sequence.
        n_embd: D, of tokens and memory.
        n_layer: L.
        n_head: H; divides `n_embd`.
        dropout: on embeddings, attention weights and residual branches.
        layer_norm_epsilon: of every normalisation.
        activation: of the MLPs, ``gelu_new`` (by tanh, GPT-2's own) or ``gelu`` (exact).
        empty_slot: whether every token sees one more place before the first, whose key and value are zero.

    Attributes:
        gradient_checkpointing: whether training keeps only each layer's input, and computes the layer once more for its
            gradient.

    Raises:
        InputError: `n_head` does not divide `n_embd`.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        n_positions: int,
        n_embd: int,
        n_layer: int,
        n_head: int,
        dropout: float,
        layer_norm_epsilon: float = 1e-5,
        activation: str = "gelu_new",
        empty_slot: bool = False,
    ) -> None:
        super().__init__()
        if n_head < 1 or n_embd % n_head:
            raise InputError(f"model.decoder.n_head={n_head} must divide model.decoder.n_embd={n_embd}")
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(n_positions, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(
            GPT2Block(layer, n_embd, n_head, dropout, layer_norm_epsilon, activation, empty_slot)
            for layer in range(n_layer)
        )
        self.ln_f = nn.LayerNorm(n_embd, layer_norm_epsilon)
        self.empty_slot = empty_slot
        self.gradient_checkpointing = False
        self._head: tuple[Tensor, Tensor | None] | None = None  # in place of the embedding, see `keep_head`
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2's scaling of what is added to the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.h)))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def silence_cross_attention(self) -> None:
        """Let the cross-attention add nothing at first: training then starts from the language model as it is."""
        for block in self.h:
            assert isinstance(block, GPT2Block)
            nn.init.zeros_(block.crossattention.c_proj.weight)
            nn.init.zeros_(block.crossattention.c_proj.bias)

    def keep_head(self, dtype: torch.dtype | None = None, *, pack: bool = False) -> None:
        """Keep the embedding once more, as the output layer's weight, until `drop_head`; no gradient comes to it.

        Args:
            dtype: that logits are computed in, the weights' own if None; see `centred`.
            pack: in the order in which a CPU multiplies it fastest.
        """
        weight = self.wte.weight.detach()
        weight, common = centred(weight, dtype or weight.dtype)
        self._head = packed(weight) if pack else weight, common

    def drop_head(self) -> None:
        self._head = None

    def _apply(self, *args: Any, **kwargs: Any) -> GPT2:
        self._head = None  # it would stay where, and as, the embedding was
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._head = None
        super()._load_from_state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> GPT2:
        """Like any module's; what learns has no head of its own."""
        if mode:
            self._head = None
        return super().train(mode)

    def project_memory(self, memory: Tensor) -> list[KeyValue]:
        """Project the (B, N, D) memory to each layer's (B, H, N, d) keys and values, once for all rows."""
        return [block.crossattention.project(memory) for block in self.h]  # type: ignore[union-attr, operator]

    def forward(
        self,
        tokens: Tensor,
        memory: list[KeyValue],
        cache: DecodingCache | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Map (R, T) tokens to their (R, T, D) last hidden states; `logits` takes them further.

        Padding at the end needs no mask: no token sees a later one.

        Args:
            tokens: (R, T) int64; with a `cache`, the tokens that follow those in it.
            memory: what `project_memory` returned for the B images of these rows.
            cache: with room for these tokens, which are written to it.
            packing: of these rows; then only valid tokens are worked on, and the result is (n, D).
        """
        if packing:
            tokens, positions = tokens.flatten()[packing.places], packing.positions  # (n,) each
        else:
            length = tokens.shape[1]
            positions = cache.positions(length) if cache else torch.arange(length, device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (R, T, D), packed (n, D)
        for block, key_value in zip(self.h, cache.memory if cache else memory, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, key_value, None, packing, use_reentrant=False)
            else:
                x = block(x, key_value, cache, packing)
        return self.ln_f(x)

    def cross_attention(self, tokens: Tensor, memory: list[KeyValue]) -> Tensor:
        """How much each of (R, T) tokens looks at each latent position, as it is read: (R, L, H, T, N), sums of 1."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]  # (R, T, D)
        weights = []
        for block, key_value in zip(self.h, memory, strict=True):
            assert isinstance(block, GPT2Block)
            x = x + block.attn(block.ln_1(x))
            looking = block.ln_cross_attn(x)
            weights.append(block.crossattention.weights(looking, key_value[0]))
            x = x + block.crossattention(looking, key_value)
            x = x + block.mlp(block.ln_2(x))
        return torch.stack(weights, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (…, D) hidden states to (…, V) logits by the tied embedding."""
        weight, common = self._head or (self.wte.weight, None)
        logits = linear(hidden, weight)
        return logits if common is None else logits.float() + (hidden.float() * common).sum(-1, keepdim=True)

    def step(self, ids: Tensor, cache: DecodingCache) -> Tensor:
        """Feed each row's newest token, (R,), for which `cache` has room; returns the (R, V) logits of the next one."""
        return self.logits(self(ids[:, None], cache.memory, cache)[:, -1])


class GPT2Block(nn.Module):
    def __init__(
        self,
        layer: int,
        n_embd: int,
        n_head: int,
        dropout: float,
        layer_norm_epsilon: float,
        activation: str,
        empty_slot: bool,
    ) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd, layer_norm_epsilon)
        self.attn = SelfAttention(layer, n_embd, n_head, dropout, empty_slot)
        self.ln_cross_attn = nn.LayerNorm(n_embd, layer_norm_epsilon)
        self.crossattention = CrossAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd, layer_norm_epsilon)
        self.mlp = GPT2MLP(n_embd, dropout, activation)

    def forward(
        self, x: Tensor, memory: KeyValue, cache: DecodingCache | None, packing: Packing | None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, packing)
        x = x + self.crossattention(self.ln_cross_attn(x), memory, packing)
        return x + self.mlp(self.ln_2(x))


class SelfAttention(nn.Module):
    def __init__(self, layer: int, n_embd: int, n_head: int, dropout: float, empty_slot: bool) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout, self.empty_slot = layer, n_head, dropout, empty_slot
        self.c_attn = Linear(n_embd, 3 * n_embd)
        self.c_proj = Linear(n_embd, n_embd)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, cache: DecodingCache | None = None, packing: Packing | None = None
    ) -> Tensor:
        qkv = self.c_attn(x)
        if packing:
            qkv = packing.unpack(qkv)
        rows, length, width = qkv.shape[0], qkv.shape[1], x.shape[-1]
        images = len(cache.memory[0][0]) if cache else rows
        qkv = qkv.view(images, -1, 3, self.n_head, width // self.n_head)  # (B, G*T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, G*T, d) each; without a cache a row stands for an image
        mask, is_causal = None, True
        if cache:
            k, v = cache.append(self.layer, k, v)  # (B, H, slots, d) each
            mask, is_causal = cache.mask, length > 1
        elif self.empty_slot:
            k, v = (F.pad(x, (0, 0, 1, 0)) for x in (k, v))  # (B, H, 1 + T, d) each
        if self.empty_slot and is_causal:  # and all see the empty slot, which `is_causal` knows nothing of
            mask, is_causal = x.new_ones(length, 1 + length, dtype=torch.bool).tril(1), False
        dropout = self.dropout if self.training else 0.0
        x = attention(q, k, v, mask=mask, is_causal=is_causal, dropout=dropout)
        x = x.transpose(1, 2).reshape(rows, length, width)  # (R, T, D)
        return self.resid_dropout(self.c_proj(packing.pack(x) if packing else x))


class CrossAttention(nn.Module):
    """Queries of all rows of an image against that image's keys and values, which are never repeated."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.q_attn = Linear(n_embd, n_embd)
        self.c_attn = Linear(n_embd, 2 * n_embd)
        self.c_proj = Linear(n_embd, n_embd)
        self.resid_dropout = nn.Dropout(dropout)

    def project(self, memory: Tensor) -> KeyValue:
        """(B, N, D) -> keys and values, (B, H, N, d) each."""
        k, v = self.c_attn(memory).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def weights(self, x: Tensor, k: Tensor) -> Tensor:
        """What `forward` weighs the values by: (R, H, T, N)."""
        images, heads, _, d = k.shape
        q = self.q_attn(x).view(images, -1, heads, d).transpose(1, 2)  # (B, H, G*T, d)
        scores = q @ k.transpose(-1, -2) / math.sqrt(d)  # (B, H, G*T, N)
        weights = scores.softmax(dim=-1).unflatten(2, (-1, x.shape[1]))  # (B, H, G, T, N)
        return weights.transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor, memory: KeyValue, packing: Packing | None = None) -> Tensor:
        k, v = memory  # (B, H, N, d)
        q = self.q_attn(x)
        if packing:
            q = packing.unpack(q)
        rows, length, width = q.shape
        q = q.view(len(k), -1, self.n_head, width // self.n_head)  # (B, G*T, H, d)
        dropout = self.dropout if self.training else 0.0
        x = attention(q.transpose(1, 2), k, v, dropout=dropout)  # (B, H, G*T, d)
        x = x.transpose(1, 2).reshape(rows, length, width)
        return self.resid_dropout(self.c_proj(packing.pack(x) if packing else x))


class GPT2MLP(nn.Module):
    def __init__(self, n_embd: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.approximate = {"gelu_new": "tanh", "gelu": "none"}[activation]
        self.c_fc = Linear(n_embd, 4 * n_embd)
        self.c_proj = Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate)))
