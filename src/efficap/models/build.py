"""From a model's configuration to the model, with fresh, pretrained or a run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from efficap.errors import InputError
from efficap.models.captioner import CaptionModel
from efficap.models.encoder import own_preprocessing
from efficap.models.pretrained.gpt2 import GPT2_SIZES, MAX_PARAMETERS, gpt2_sizes, load_gpt2
from efficap.models.weights import WEIGHTS_FILE, read_weights


def resolve_model(model: dict[str, Any]) -> dict[str, Any]:
    """Fill what the model's configuration leaves to its pretrained parts.

    Preprocessing (mean, std, interpolation, crop_pct) comes from timm's registry where it is null, the decoder's
    sizes from its checkpoint where that is pretrained, the bridge's heads from the decoder. The result builds the
    same model without network.

    Raises:
        InputError: an unknown EfficientNet, a GPT-2 that cannot be had, or a file of weights that is not to be read.
    """
    encoder, bridge, decoder = dict(model["encoder"]), dict(model["bridge"]), dict(model["decoder"])
    if encoder["weights_file"] is not None and not encoder["pretrained"]:
        raise InputError(
            f"model.encoder.weights_file={encoder['weights_file']} is not read with model.encoder.pretrained=false; "
            "add model.encoder.pretrained=true, or leave it out"
        )
    encoder |= {
        key: value for key, value in own_preprocessing(encoder["name"]).items() if encoder[key] is None
    }
    if decoder["pretrained"]:
        decoder |= gpt2_sizes(decoder["name"])
    if bridge["n_heads"] is None:
        bridge["n_heads"] = decoder["n_head"]
    return {**model, "encoder": encoder, "bridge": bridge, "decoder": decoder}


def preprocessing(model: dict[str, Any]) -> dict[str, Any]:
    """How pictures are made for a resolved model: ``image_size``, ``interpolation`` and ``crop_pct``."""
    encoder = model["encoder"]
    return {
        "image_size": model["image_size"],
        "interpolation": encoder["interpolation"],
        "crop_pct": encoder["crop_pct"],
    }


def output_stride(model: dict[str, Any]) -> int:
    """Pixels of a side that a latent position of a model stands for."""
    stride: int = model["encoder"].get("output_stride", 32)  # runs from before there was a choice lack it
    return stride


def build_model(model: dict[str, Any], vocab_size: int) -> CaptionModel:
    """A captioner with fresh weights from a resolved model configuration (see `resolve_model`).

    Raises:
        InputError: sizes that do not go together, or more than `MAX_PARAMETERS`.
    """
    if (parameters := _least_parameters(model, vocab_size)) > MAX_PARAMETERS:
        raise InputError(
            f"model: {_sizes(model)} and {vocab_size:,} tokens make {parameters:.0e} parameters; more than "
            f"{MAX_PARAMETERS:.0e} are not built"
        )
    encoder, decoder = model["encoder"], model["decoder"]
    return CaptionModel(
        image_size=model["image_size"],
        vocab_size=vocab_size,
        encoder={key: encoder[key] for key in ("name", "mean", "std", "frozen", "drop_path_rate")}
        | {"output_stride": output_stride(model)},
        bridge={key: model["bridge"][key] for key in ("n_blocks", "n_heads", "dropout")},
        decoder={key: decoder[key] for key in (*GPT2_SIZES, "dropout")},
        arithmetic=model.get("arithmetic", "gpt2"),  # runs from before there was a choice lack it
    )


def _least_parameters(model: dict[str, Any], vocab_size: int) -> int:
    """As many as the model has at least: its encoder and what is small in the rest are not counted."""
    decoder, width = model["decoder"], model["decoder"]["n_embd"]
    matrices = 12 * decoder["n_layer"] + 4 * model["bridge"]["n_blocks"]
    return int(matrices * width**2 + (vocab_size + decoder["n_positions"]) * width)


def _sizes(model: dict[str, Any]) -> str:
    own = {f"decoder.{size}": model["decoder"][size] for size in GPT2_SIZES}
    return ", ".join(
        f"{size}={value}" for size, value in {**own, "bridge.n_blocks": model["bridge"]["n_blocks"]}.items()
    )


def load_first_weights(captioner: CaptionModel, model: dict[str, Any]) -> None:
    """Let a fresh captioner begin with the pretrained weights that its resolved configuration asks for.

    An encoder that is to learn from nothing begins with silent residual branches.

    Raises:
        InputError: they cannot be had or do not fit; the message says how to do without.
    """
    if model["decoder"]["pretrained"]:
        load_gpt2(captioner.decoder, model["decoder"]["name"])
    if model["encoder"]["pretrained"]:
        captioner.encoder.load_pretrained(model["encoder"]["name"], model["encoder"]["weights_file"])
    elif not model["encoder"]["frozen"]:
        captioner.encoder.silence_residuals()


def load_model(run_dir: Path, model: dict[str, Any], vocab_size: int) -> CaptionModel:
    """The trained captioner of a run directory, in evaluation mode.

    Args:
        run_dir: holds model.safetensors.
        model: the resolved model configuration of that run.
        vocab_size: of that run's tokenizer.

    Raises:
        InputError: there are no weights, or they are another model's.
    """
    if not (run_dir / WEIGHTS_FILE).is_file():
        raise InputError(
            f"{run_dir} holds no {WEIGHTS_FILE}: training writes it at its first validation; has it come that far?"
        )
    weights = read_weights(run_dir / WEIGHTS_FILE)
    misfit = f"{run_dir / WEIGHTS_FILE} does not fit {run_dir}/config.yaml"
    found = sum(weight.numel() for weight in weights.values())
    if (needed := _least_parameters(model, vocab_size)) > found:  # before there is memory for them
        raise InputError(
            f"{misfit}: it has {found:,} values, fewer than the {needed:,} of {_sizes(model)} and {vocab_size:,} tokens"
        )
    captioner = build_model(model, vocab_size)
    try:
        captioner.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{misfit}: {' '.join(str(error).split())[:500]}") from error
    return captioner.eval()
