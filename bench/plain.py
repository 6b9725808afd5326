"""What a user would write in efficap's place: timm's encoder as it comes, the same bridge, transformers' GPT-2.

B images, T tokens, N positions of the memory, D width.
"""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LogitsProcessorList

from efficap.models.captioner import CaptionModel

MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "encoder": "tf_efficientnetv2_s",
        "image_size": 224,
        "vocab_size": 50_257,
        "n_blocks": 2,
        "decoder": {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024},
    },
    "medium": {
        "encoder": "tf_efficientnetv2_m",
        "image_size": 224,
        "vocab_size": 50_257,
        "n_blocks": 8,
        "decoder": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "n_positions": 1024},
    },
    "b0": {
        "encoder": "efficientnet_b0",
        "image_size": 128,
        "vocab_size": 4096,
        "n_blocks": 2,
        "decoder": {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 64},
    },
}


def build(model: str, vocab_size: int | None = None) -> CaptionModel:
    """A captioner of random weights, of `MODELS`' sizes."""
    sizes = MODELS[model]
    heads = sizes["decoder"]["n_head"]
    return CaptionModel(
        image_size=sizes["image_size"],
        vocab_size=vocab_size or sizes["vocab_size"],
        encoder={
            "name": sizes["encoder"],
            "frozen": False,
            "drop_path_rate": 0.0,
            "output_stride": 32,
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
        },
        bridge={"n_blocks": sizes["n_blocks"], "n_heads": heads, "dropout": 0.0},
        decoder={"dropout": 0.0, **sizes["decoder"]},
    )


class Plain(nn.Module):
    """The same model with the same weights, put together from timm and transformers.

    Args:
        captioner: whose sizes and weights it takes.
        encoder: timm's name of its encoder.
        dropout: of the decoder.
    """

    def __init__(self, captioner: CaptionModel, encoder: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = timm.create_model(encoder, num_classes=0, global_pool="")
        self.encoder.load_state_dict(captioner.encoder.backbone.state_dict())
        self.bridge = copy.deepcopy(captioner.bridge)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", captioner.encoder.mean, persistent=False)
        self.register_buffer("std", captioner.encoder.std, persistent=False)
        decoder = captioner.decoder
        end = decoder.wte.num_embeddings - 1
        config = GPT2Config(
            vocab_size=decoder.wte.num_embeddings,
            n_positions=decoder.wpe.num_embeddings,
            n_embd=decoder.wte.embedding_dim,
            n_layer=len(decoder.h),
            n_head=decoder.h[0].attn.n_head,  # type: ignore[union-attr]
            add_cross_attention=True,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
        self.gpt2 = GPT2LMHeadModel(config)
        theirs = self.gpt2.transformer.state_dict()
        with torch.no_grad():
            for name, weight in decoder.state_dict().items():
                is_conv1d = weight.ndim == 2 and name.startswith("h.")  # transformers stores these transposed
                theirs[name].copy_(weight.T if is_conv1d else weight)
        self.to(next(captioner.parameters()))
        self.train(captioner.training)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, N, D)."""
        pixels = (images.to(self.mean.dtype) - self.mean) / self.std
        memory: Tensor = self.bridge(self.encoder.forward_features(pixels))
        return memory

    def loss(self, images: Tensor, tokens: Tensor, lengths: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of one caption of each picture: tokens (B, T), valid ones (B,)."""
        padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths[:, None]  # (B, T)
        logits = self.gpt2(
            input_ids=tokens,
            attention_mask=(~padding).long(),
            encoder_hidden_states=self.encode(images),
            use_cache=False,
        ).logits  # (B, T, V)
        labels = tokens.masked_fill(padding, -100)[:, 1:]
        return F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing
        )

    def generate(self, images: Tensor, *, bos_id: int, eos_id: int, **options: Any) -> Tensor:
        """The (B, T) best captions by transformers' `generate`."""
        prompt = torch.full((len(images), 1), bos_id, device=images.device)
        processors = options.pop("logits_processor", LogitsProcessorList())
        tokens: Tensor = self.gpt2.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            encoder_hidden_states=self.encode(images),
            eos_token_id=eos_id,
            pad_token_id=eos_id,
            do_sample=False,
            logits_processor=processors,
            **options,
        )
        return tokens
