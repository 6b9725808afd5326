"""GPT-2 with one cross-attention sublayer in every block, between self-attention and MLP.

B images, G rows of each (K captions in training, beams in decoding), R = B * G rows, image-major; T tokens,
N positions of the memory, D width, H heads of width d, L layers, V vocabulary.

Modules carry transformers' names (``h.0.attn.c_attn`` …), so that weights map one to one; transformers stores
these matrices as (in, out), this module as torch's Linear does, (out, in).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficap.errors import InputError

KeyValue = tuple[Tensor, Tensor]


class DecodingCache:
    """Keys and values of the tokens so far, and of the memory, for decoding one token at a time.

    Args:
        memory: for each layer the (B, H, N, d) keys and values of the pictures, shared by the rows of each.
        max_tokens: the longest sequence that it will hold.
    """

    def __init__(self, memory: list[KeyValue], max_tokens: int) -> None:
        self.memory = memory
        self.max_tokens = max_tokens
        self.length = 0
        images, heads, _, d = memory[0][0].shape
        shape = (len(memory), images, heads, max_tokens, d)  # (L, R, H, T, d)
        self.keys = memory[0][0].new_empty(shape)
        self.values = memory[0][0].new_empty(shape)

    def reorder(self, parents: Tensor) -> None:
        """Row r continues what was row parents[r]; their number may change, the images may not."""
        shape = (self.keys.shape[0], len(parents), *self.keys.shape[2:])
        keys, values = self.keys.new_empty(shape), self.values.new_empty(shape)
        keys[:, :, :, : self.length] = self.keys[:, :, :, : self.length].index_select(1, parents)
        values[:, :, :, : self.length] = self.values[:, :, :, : self.length].index_select(1, parents)
        self.keys, self.values = keys, values

    def append(self, layer: int, key: Tensor, value: Tensor) -> KeyValue:
        """Add (R, H, t, d) of the newest tokens; returns all (R, H, length + t, d) of this layer."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019): learned positions, pre-norm, gelu_new, output tied to the embedding.

    Args:
        vocab_size: V.
        n_positions: the longest sequence.
        n_embd: D, of tokens and memory.
        n_layer: L.
        n_head: H; divides `n_embd`.
        dropout: on embeddings, attention weights and residual branches.

    Raises:
        InputError: `n_head` does not divide `n_embd`.
    """

    def __init__(
        self, *, vocab_size: int, n_positions: int, n_embd: int, n_layer: int, n_head: int, dropout: float
    ) -> None:
        super().__init__()
        if n_head < 1 or n_embd % n_head:
            raise InputError(f"model.decoder.n_head={n_head} must divide model.decoder.n_embd={n_embd}")
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(n_positions, n_embd)
        self.drop = nn.Dropout(dropout)
        self.h = nn.ModuleList(GPT2Block(layer, n_embd, n_head, dropout) for layer in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # GPT-2's scaling of what is added to the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * len(self.h)))
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for (
            block
        ) in self.h:  # the cross-attention adds nothing at first: training starts from the language model
            assert isinstance(block, GPT2Block)
            nn.init.zeros_(block.crossattention.c_proj.weight)

    def project_memory(self, memory: Tensor) -> list[KeyValue]:
        """Project the (B, N, D) memory to each layer's (B, H, N, d) keys and values, once for all rows."""
        return [block.crossattention.project(memory) for block in self.h]  # type: ignore[union-attr, operator]

    def forward(self, tokens: Tensor, memory: list[KeyValue], cache: DecodingCache | None = None) -> Tensor:
        """Map (R, T) tokens to their (R, T, D) last hidden states; `logits` takes them further.

        Padding at the end needs no mask: no token sees a later one.

        Args:
            tokens: (R, T) int64; with a `cache`, the tokens that follow those in it.
            memory: what `project_memory` returned for the B images of these rows.
            cache: extended in place by these tokens.
        """
        past = cache.length if cache else 0
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (R, T, D)
        for block, key_value in zip(self.h, memory, strict=True):
            x = block(x, key_value, cache)
        if cache:
            cache.length += tokens.shape[1]
        return self.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map (…, D) hidden states to (…, V) logits by the tied embedding."""
        return F.linear(hidden, self.wte.weight)

    def step(self, ids: Tensor, cache: DecodingCache) -> Tensor:
        """Feed the newest token of each row, (R,); returns the (R, V) logits of the next one."""
        return self.logits(self(ids[:, None], cache.memory, cache)[:, -1])


class GPT2Block(nn.Module):
    def __init__(self, layer: int, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = SelfAttention(layer, n_embd, n_head, dropout)
        self.ln_cross_attn = nn.LayerNorm(n_embd)
        self.crossattention = CrossAttention(n_embd, n_head, dropout)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = GPT2MLP(n_embd, dropout)

    def forward(self, x: Tensor, memory: KeyValue, cache: DecodingCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.crossattention(self.ln_cross_attn(x), memory)
        return x + self.mlp(self.ln_2(x))


class SelfAttention(nn.Module):
    def __init__(self, layer: int, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, n_head, dropout
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: DecodingCache | None) -> Tensor:
        q, k, v = (
            self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        )  # (R, H, T, d) each
        past = 0
        if cache:
            past = cache.length
            k, v = cache.append(self.layer, k, v)  # (R, H, past + T, d) each
        assert past == 0 or x.shape[1] == 1, "with a past, one token at a time"
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=past == 0)
        x = self.c_proj(x.transpose(1, 2).flatten(2))  # (R, T, D)
        return self.resid_dropout(x)


class CrossAttention(nn.Module):
    """Queries of all rows of an image against that image's keys and values, which are never repeated."""

    def __init__(self, n_embd: int, n_head: int, dropout: float) -> None:
        super().__init__()
        self.n_head, self.dropout = n_head, dropout
        self.q_attn = nn.Linear(n_embd, n_embd)
        self.c_attn = nn.Linear(n_embd, 2 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.resid_dropout = nn.Dropout(dropout)

    def project(self, memory: Tensor) -> KeyValue:
        """(B, N, D) -> keys and values, (B, H, N, d) each."""
        k, v = self.c_attn(memory).unflatten(-1, (2, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def forward(self, x: Tensor, memory: KeyValue) -> Tensor:
        k, v = memory  # (B, H, N, d)
        rows, length, width = x.shape
        q = self.q_attn(x).view(len(k), -1, self.n_head, width // self.n_head)  # (B, G*T, H, d)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, dropout_p=dropout)  # (B, H, G*T, d)
        x = self.c_proj(x.transpose(1, 2).reshape(rows, length, width))
        return self.resid_dropout(x)


class GPT2MLP(nn.Module):
    def __init__(self, n_embd: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))
