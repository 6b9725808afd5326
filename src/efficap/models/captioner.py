"""The whole model: EfficientNet, bridge and GPT-2 in one forward.

B images, K captions of each, T tokens, N latent positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from efficap.errors import InputError
from efficap.models.bridge import Bridge
from efficap.models.cache import DecodingCache, FixedCache
from efficap.models.encoder import ImageEncoder
from efficap.models.gpt2 import GPT2
from efficap.models.linear import Linear
from efficap.models.original import DECODER, OriginalBridge
from efficap.models.packing import Packing


class CaptionModel(nn.Module):
    """Encode pictures once, then read them from every layer of GPT-2.

    Args:
        image_size: pixels, height and width of the pictures.
        vocab_size: V.
        encoder, bridge, decoder: the keyword arguments of `ImageEncoder`, `Bridge` and `GPT2` that do not follow
            from the other parts.
        arithmetic: ``gpt2``; or ``original``, as the TensorFlow project trained its models, and ``original_no_past``,
            the same without an empty place before the first token (see `efficap.models.original`).

    Raises:
        InputError: an unknown arithmetic, or what the parts refuse.
    """

    def __init__(
        self,
        *,
        image_size: int,
        vocab_size: int,
        encoder: dict[str, Any],
        bridge: dict[str, Any],
        decoder: dict[str, Any],
        arithmetic: str = "gpt2",
    ) -> None:
        super().__init__()
        if arithmetic not in DECODER:
            raise InputError(f"model.arithmetic={arithmetic} must be one of {', '.join(DECODER)}")
        self.encoder = ImageEncoder(image_size=image_size, **encoder)
        self.decoder = GPT2(vocab_size=vocab_size, **decoder, **DECODER[arithmetic])
        self.bridge = (Bridge if arithmetic == "gpt2" else OriginalBridge)(
            channels=self.encoder.channels, grid=self.encoder.grid, width=decoder["n_embd"], **bridge
        )
        self._compiled_step: Callable[[Tensor, DecodingCache], Tensor] | None = None
        self._pictures = 0  # of a batch that is decoded, once that is compiled

    def checkpoint_gradients(self) -> None:
        """From now on train with less memory, and about a third more work: layers are computed again for gradients."""
        self.encoder.checkpoint_gradients()
        self.decoder.gradient_checkpointing = True

    def compile_parts(self) -> None:
        """From now on run what has fixed shapes through torch.compile, in place: names of weights stay.

        The decoder's tokens are packed, so that their number changes with each batch, and in decoding with each step:
        of its layers only the MLP, for which that is one more dimension, is compiled.
        """
        self.encoder.compile()
        self.bridge.compile()
        for block in self.decoder.h:
            block.get_submodule("mlp").compile(dynamic=True)

    def pack_weights(self) -> None:
        """From now on decode, alone, with weights in the order that a CPU multiplies them in; see `packed`."""
        for layer in self.modules():
            if isinstance(layer, Linear):
                layer.pack()
        self.decoder.keep_head(pack=True)

    def compile_decoding(self) -> None:
        """From now on decode through torch.compile, with the same shapes in every batch and step: all is compiled once.

        A batch that is smaller than the largest so far is filled up, and pictures that are done stay in it.
        """
        self.encoder.compile(dynamic=False)
        self.bridge.compile(dynamic=False)
        self.decoder.keep_head()
        self._compiled_step = torch.compile(self.decoder.step, dynamic=False)

    def encode(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) uint8 pictures, or the (B, C, h, w) feature maps of such, to their (B, N, D) memory."""
        return self.bridge(self._features(images))

    def _features(self, images: Tensor) -> Tensor:
        is_feature_map = images.dtype == torch.bfloat16
        return images.to(self.bridge.norm_in.weight.dtype) if is_feature_map else self.encoder(images)

    def hidden_states(self, memory: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        """The decoder's last hidden states, (n, D), at some places of K captions of each picture.

        Args:
            memory: (B, N, D), what `encode` made of the pictures.
            tokens: (B, K, T) int64.
            places: (n,) int64, ascending, of the flattened tokens; those before a place in its caption are among them.
        """
        rows = tokens.flatten(0, 1)  # (B*K, T)
        packing = Packing(places, *rows.shape)
        hidden: Tensor = self.decoder(rows, self.decoder.project_memory(memory), packing=packing)
        return hidden

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The (B, K, T, V) logits of the token after each; a loss needs fewer and starts from `hidden_states`."""
        memory = self.decoder.project_memory(self.encode(images))
        hidden: Tensor = self.decoder(tokens.flatten(0, 1), memory)  # (B*K, T, D)
        return self.decoder.logits(hidden).unflatten(0, tokens.shape[:2])

    def cross_attention(self, images: Tensor, tokens: Tensor, *, rollout: bool = False) -> Tensor:
        """Where the decoder looks as it reads captions (B, K, T) of (B, 3, H, W) pictures.

        Args:
            rollout: whether to follow it through the bridge's blocks, which mix positions, back to the feature map.

        Returns:
            (B, K, L, H, T, N) weights of each layer and head; ``[…, t, :]`` are those of the step that writes token
            t + 1.
        """
        features = self._features(images)
        memory = self.decoder.project_memory(self.bridge(features))
        weights = self.decoder.cross_attention(tokens.flatten(0, 1), memory).unflatten(0, tokens.shape[:2])
        return weights @ self.bridge.rollout(features)[:, None, None, None] if rollout else weights

    def start(self, images: Tensor, max_tokens: int, rows: int = 1) -> DecodingState | FixedDecodingState:
        """Encode (B, 3, H, W) pictures for decoding captions of up to `max_tokens`, BOS and EOS counted.

        Args:
            rows: of a picture after the prompt, beams or samples: the compiled step is for so many.

        Raises:
            InputError: the decoder has no positions for that many.
        """
        if max_tokens > self.decoder.wpe.num_embeddings:
            raise InputError(
                f"decoding.max_tokens={max_tokens} is more than the decoder's "
                f"model.decoder.n_positions={self.decoder.wpe.num_embeddings}"
            )
        if self._compiled_step is None:
            return DecodingState(self.decoder, self.encode(images), max_tokens)
        self._pictures = max(self._pictures, len(images))
        filled = images.new_zeros(self._pictures, *images.shape[1:])
        filled[: len(images)] = images
        memory = self.encode(filled)
        return FixedDecodingState(self.decoder, memory, max_tokens, len(images), self._compiled_step, rows)

    def fill_up_to(self, pictures: int) -> None:
        """From now on fill up a batch that is decoded through torch.compile to so many: memory had no room for more."""
        self._pictures = min(self._pictures, pictures)


class DecodingState:
    """The step function that `efficap.decoding` drives, over the pictures it was started with.

    The memory's keys and values are projected once and shared by all rows of a picture.

    Attributes:
        memory: (B, N, D), of the pictures it was started with.
    """

    def __init__(self, decoder: GPT2, memory: Tensor, max_tokens: int) -> None:
        self.decoder, self.memory = decoder, memory
        self.cache = DecodingCache(decoder.project_memory(memory), max_tokens, decoder.empty_slot)

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None = None) -> Tensor:
        """Feed each row's newest token, (R,); returns (R, V) logits. See `efficap.decoding.Step`."""
        if parents is not None:
            self.cache.follow(parents, images)
        self.cache.advance(1)
        return self.decoder.step(ids, self.cache)


class FixedDecodingState:
    """The same, but with the rows of all pictures in every step, also of those that are done and of those that fill up.

    Args:
        memory: (B, N, D), of which only the first `pictures` are asked for.
        step: compiled from the decoder's, for all steps with as many rows of a picture as come after the prompt.
        rows: how many these are.
    """

    def __init__(
        self,
        decoder: GPT2,
        memory: Tensor,
        max_tokens: int,
        pictures: int,
        step: Callable[[Tensor, DecodingCache], Tensor],
        rows: int,
    ) -> None:
        self.decoder, self.step, self.rows = decoder, step, rows
        self.memory = memory[:pictures]
        keys_and_values = [(k.contiguous(), v.contiguous()) for k, v in decoder.project_memory(memory)]
        self.cache = FixedCache(keys_and_values, max_tokens, decoder.empty_slot)
        # places of the pictures that are still asked for
        self.open = torch.arange(pictures, device=memory.device)

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None = None) -> Tensor:
        """As `DecodingState`."""
        if images is not None:
            self.open = self.open[images]
        of_open = ids.view(len(self.open), -1)  # (B', G)
        shape = len(self.cache.memory[0][0]), of_open.shape[1]  # B, G
        if parents is not None:
            own = parents.new_zeros(shape)  # rows of pictures that are done may follow any
            own[self.open] = parents.view_as(of_open) % self.cache.rows
            self.cache.follow(own.flatten(), None)
        every = ids.new_zeros(shape)
        every[self.open] = of_open
        self.cache.advance(1)
        step = self.step if shape[1] == self.rows else self.decoder.step
        logits = step(every.flatten(), self.cache)  # (B*G, V)
        return logits.view(*shape, -1)[self.open].flatten(0, 1)
