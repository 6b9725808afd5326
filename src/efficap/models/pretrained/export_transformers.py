"""The decoder as a directory that transformers loads.

B images, T tokens, N latent positions, D width, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from efficap.errors import InputError
from efficap.models.gpt2 import GPT2, GPT2MLP
from efficap.models.pretrained.gpt2 import transformers_state_dict
from efficap.models.weights import WEIGHTS_FILE
from efficap.tokenizer import CaptionTokenizer

_ACTIVATIONS = {
    "tanh": "gelu_new",
    "none": "gelu",
}  # torch's name of the approximation: transformers' of the GELU
TOLERANCE = 2e-4  # of a logit, in nats


def export_transformers(
    decoder: GPT2, tokenizer: CaptionTokenizer, directory: Path, *, max_tokens: int
) -> None:
    """Write what ``GPT2LMHeadModel.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load.

    The model takes the (B, N, D) memory of the pictures, ``CaptionModel.encode(images)``, as `encoder_hidden_states`.

    Args:
        decoder: with its weights.
        tokenizer: of the same run.
        directory: is made.
        max_tokens: of a caption that ``generate`` writes where it is not told otherwise, BOS and EOS counted.

    Raises:
        InputError: transformers' GPT-2 cannot compute what this decoder does.
    """
    from transformers import GenerationConfig, GPT2Config

    special: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    config = GPT2Config(
        **_arithmetic(decoder), **special, architectures=["GPT2LMHeadModel"], add_cross_attention=True
    )
    config.save_pretrained(directory)
    GenerationConfig(**special, max_length=max_tokens, do_sample=False).save_pretrained(directory)
    weights = transformers_state_dict(decoder.state_dict())
    file = directory / WEIGHTS_FILE
    # The metadata is what transformers asks of a file.
    save_file({name: weight.cpu() for name, weight in weights.items()}, file, {"format": "pt"})
    file.chmod((directory / "config.json").stat().st_mode)  # safetensors writes it for its owner alone
    tokenizer.save(directory)


def _arithmetic(decoder: GPT2) -> dict[str, Any]:
    """Sizes and options of a decoder under transformers' names."""
    if decoder.empty_slot:
        raise InputError(
            "the model's decoder sees an empty place before the first token (model.arithmetic=original), which "
            "transformers' GPT-2 does not have; --format onnx takes it along"
        )
    vocab_size, n_embd = decoder.wte.weight.shape
    block = decoder.h[0]
    mlp: GPT2MLP = block.get_submodule("mlp")  # type: ignore[assignment]
    dropout = decoder.drop.p
    return {
        "vocab_size": vocab_size,
        "n_positions": decoder.wpe.num_embeddings,
        "n_embd": n_embd,
        "n_layer": len(decoder.h),
        "n_head": block.get_submodule("attn").n_head,
        "layer_norm_epsilon": decoder.ln_f.eps,
        "activation_function": _ACTIVATIONS[mlp.approximate],
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout),
    }


@torch.no_grad()
def check_transformers(decoder: GPT2, directory: Path, memory: Tensor, tokens: Tensor) -> float:
    """How far the logits of an exported directory are from the decoder's, at most.

    Args:
        memory: (B, N, D), of some pictures.
        tokens: (B, T) int64, any.

    Raises:
        InputError: they differ by more than 2e-4.
    """
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        theirs = GPT2LMHeadModel.from_pretrained(directory).eval()
    finally:
        logging.enable_progress_bar()
    expected = decoder.logits(decoder(tokens, decoder.project_memory(memory)))  # (B, T, V)
    difference = float((theirs(tokens, encoder_hidden_states=memory).logits - expected).abs().max())
    if not difference <= TOLERANCE:
        raise InputError(
            f"transformers' logits differ from the run's by {difference:.2g}, more than {TOLERANCE}; "
            "nothing is written"
        )
    return difference
