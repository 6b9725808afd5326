"""A model of the original TensorFlow project, from its files to captions, scores and further training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import timm
import torch
from conftest import compose, tiny_overrides, write_colour_table
from torch import Tensor

from efficap.commands.caption import caption
from efficap.commands.evaluate import evaluate
from efficap.commands.run_dir import RunDirectory
from efficap.commands.train import train
from efficap.models.pretrained.__main__ import main
from efficap.models.pretrained.keras_efficientnet import _keras_layers
from efficap.tokenizer import CaptionTokenizer

pytestmark = pytest.mark.slow
ARCHITECTURE = "tf_efficientnetv2_b0"
WIDTH, HEADS, POSITIONS, CHANNELS = 32, 4, 6, 1280
TOKENIZER = CaptionTokenizer.learn(["a red picture", "all of it is green", "blue and grey"], vocab_size=300)
WORDS = TOKENIZER.vocab_size
SETTINGS = {
    "hparams": {"n_vocab": WORDS, "n_ctx": 24, "n_embd": WIDTH, "n_head": HEADS, "n_layer": 2},
    "n_spe": 1,
    "encoder_head": HEADS,
    "image_size": 64,
}


def block(end: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    """Names, as the project's variables end, and shapes of one transformer block."""
    sizes = {"c_attn/attn": (width, 3 * width), "c_proj/attn": (width, width)}
    sizes |= {"c_fc/mlp": (width, 4 * width), "c_proj/mlp": (4 * width, width)}
    shapes: dict[str, tuple[int, ...]] = {
        f"{kind}/{norm}/{end}": (width,) for kind in "gb" for norm in ("ln_1", "ln_2")
    }
    for name, size in sizes.items():
        shapes |= {f"w/{name}/{end}": (1, *size), f"b/{name}/{end}": size[1:]}
    return shapes


def as_keras_stores(backbone: Any) -> dict[str, np.ndarray]:
    weights: dict[str, Tensor] = {}
    for layer, (name, _) in _keras_layers(ARCHITECTURE).items():
        module = backbone.get_submodule(name)
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            weights[f"{layer}/depthwise_kernel"] = module.weight.permute(2, 3, 0, 1)
        elif isinstance(module, torch.nn.Conv2d):
            weights[f"{layer}/kernel"] = module.weight.permute(2, 3, 1, 0)
            if module.bias is not None:
                weights[f"{layer}/bias"] = module.bias
        else:
            weights |= {f"{layer}/gamma": module.weight, f"{layer}/beta": module.bias}
            weights |= {
                f"{layer}/moving_mean": module.running_mean,
                f"{layer}/moving_variance": module.running_var,
            }
    return {f"efficientnetv2-b0/{name}:0": value.detach().numpy() for name, value in weights.items()}


def write(file: Path, shapes: dict[str, tuple[int, ...]], **others: np.ndarray) -> Path:
    random = np.random.RandomState(0)
    with h5py.File(file, "w") as hdf5:
        for name, shape in shapes.items():
            value = 0.3 * random.standard_normal(shape) + float("g/" in name)
            hdf5[f"{name}:0"] = value.astype(np.float32)
        for name, value in others.items():
            hdf5[name] = value
    return file


@pytest.fixture(scope="module")
def backbone() -> Any:
    torch.manual_seed(0)
    return timm.create_model(ARCHITECTURE, num_classes=0, global_pool="").eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, backbone: Any) -> Path:
    folder = tmp_path_factory.mktemp("original")
    bridge: dict[str, tuple[int, ...]] = {
        "encoder/group_normalization/gamma": (CHANNELS,),
        "encoder/group_normalization/beta": (CHANNELS,),
        "encoder/conv1d/kernel": (1, CHANNELS, WIDTH),
        "encoder/conv1d/bias": (WIDTH,),
        "encoder/position_embedding/embeddings": (POSITIONS, WIDTH),
    }
    write(folder / "encoder.h5", bridge | block("block_0"), **as_keras_stores(backbone))
    decoder: dict[str, tuple[int, ...]] = {"wte": (WORDS, WIDTH), "wpe": (24, WIDTH), "wsp": (1, WIDTH)}
    decoder |= {"g/ln_f": (WIDTH,), "b/ln_f": (WIDTH,)}
    for layer in ("h0", "h1"):
        decoder |= block(layer) | {f"{kind}/cross_norm1_{layer}": (WIDTH,) for kind in "gb"}
        for end, size in (("inp", 2 * WIDTH), ("out", WIDTH)):
            decoder |= {
                f"w/cross_MHA_{layer}_cross_{end}": (1, WIDTH, size),
                f"b/cross_MHA_{layer}_cross_{end}": (size,),
            }
    write(folder / "decoder.h5", decoder)
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    TOKENIZER.save(folder / "tokenizer")
    return folder


def arguments(files: Path, out: Path, **changes: Any) -> list[str]:
    options = {
        "encoder": files / "encoder.h5",
        "decoder": files / "decoder.h5",
        "config": files / "config.json",
    }
    options |= {"tokenizer": files / "tokenizer", "out": out, **changes}
    return ["import-original", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def run(files: Path) -> Path:
    assert main(arguments(files, files / "run")) == 0
    return files / "run"


@torch.no_grad()
def test_the_efficientnet_within_gives_kerass_feature_map(run: Path, backbone: Any) -> None:
    tokenizer = RunDirectory(run).tokenizer()
    captioner = RunDirectory(run).captioner(tokenizer, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    features: Tensor = backbone.forward_features((images / 255 - mean) / std)
    assert torch.allclose(captioner.encoder(images), features, atol=1e-4)
    assert tokenizer.bos_id == WORDS
    assert tokenizer.eos_id != tokenizer.bos_id


def test_it_captions_is_scored_and_learns_more(run: Path, tmp_path: Path) -> None:
    folder = write_colour_table(tmp_path / "colours")
    settings = [f"run={run}", "+decoding.max_tokens=12", "accelerator=cpu"]
    written = caption(
        compose("caption", *settings, f"images={folder}/images", f"out={tmp_path}/out", "num_workers=0")
    )
    assert all(result.captions[0].tokens[0] == WORDS for result in written)
    data = [f"+data.table={folder}/captions.csv", f"+data.image_dir={folder}/images"]
    scores = evaluate(compose("eval", *settings, *data, "split=val", "metrics=[BLEU]", "gallery=0"))
    assert scores["images"] > 0
    overrides = [o for o in tiny_overrides(folder, tmp_path / "more") if not o.startswith("model")]
    longer = train(compose("train", *overrides, f"init_from={run}", "trainer.max_epochs=1"))
    assert RunDirectory(longer).config["model"]["arithmetic"] == "original"
    assert (longer / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder": "nowhere/encoder"}, "--encoder=nowhere/encoder is neither an HDF5 file nor the prefix"),
        ({"encoder": __file__}, "is no HDF5 file"),
        ({"config": __file__}, "must be JSON with hparams"),
        ({"config": "none.json"}, "--config=none.json cannot be read"),
        ({"settings": {"n_spe": 0}}, "n_spe=0 must be at least 1"),
        (
            {"settings": {"image_size": 128}},
            "image_size=128 gives 4 positions a side, the encoder's file has 2",
        ),
        ({"settings": {"encoder_head": 5}}, "model.bridge.n_heads=5 must divide"),
        (
            {"settings": {"hparams": {**SETTINGS["hparams"], "n_vocab": 97}}},  # type: ignore[dict-item]
            f"has {WORDS} tokens, the model n_vocab=97",
        ),
        ({"settings": {"hparams": {**SETTINGS["hparams"], "n_layer": 3}}}, "does not fit the weights"),  # type: ignore[dict-item]
        ({"settings": {"hparams": {}}}, "wrong: 'n_vocab'"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    files: Path, tmp_path: Path, change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "settings" in change:
        (tmp_path / "config.json").write_text(json.dumps({**SETTINGS, **change["settings"]}))
        change = {"config": tmp_path / "config.json"}
    assert main(arguments(files, tmp_path / "out", **change)) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
