"""Published GPT-2s in every form: the same logits from each, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from efficap.errors import InputError
from efficap.models.gpt2 import GPT2
from efficap.models.pretrained.gpt2 import gpt2_sizes, load_gpt2

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 6}
VOCAB = 11


def transformers_weights(vocab_size: int = VOCAB) -> dict[str, Tensor]:
    """A tiny GPT-2 as transformers has it, its names and layout given by transformers itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **SIZES))
    return {key: torch.randn_like(value) for key, value in model.state_dict().items() if "lm_head" not in key}


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SIZES, **changes}))
    return folder


def loaded(folder: Path, vocab_size: int = VOCAB) -> GPT2:
    decoder = GPT2(vocab_size=vocab_size, **gpt2_sizes(str(folder)), dropout=0.0).eval()
    load_gpt2(decoder, str(folder))
    return decoder


def logits(decoder: GPT2, tokens: Tensor) -> Tensor:
    memory = decoder.project_memory(torch.randn(len(tokens), 3, decoder.wte.embedding_dim))
    with torch.no_grad():
        return decoder.logits(decoder(tokens, memory))


@pytest.mark.parametrize("form", ["hf_safetensors", "hf_tf_h5", "openai"])
def test_every_published_form_gives_the_published_logits(shared: Callable[[str], Path], form: str) -> None:
    folder = shared("parity") / "gpt2_tiny"
    io = np.load(folder / "io.npz")
    actual = logits(loaded(folder / form, vocab_size=97), torch.from_numpy(io["tokens"]).long())
    assert np.abs(actual.numpy() - io["logits"]).max() < 2e-4


def write_sharded(weights: dict[str, Tensor], folder: Path, stem: str, suffix: str) -> None:
    halves = dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])
    placed = {}
    for number, half in enumerate(halves, start=1):
        file = folder / f"{stem}-{number:05d}-of-00002{suffix}"
        save_file(half, file) if suffix == ".safetensors" else torch.save(half, file)
        placed |= dict.fromkeys(half, file.name)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": placed}))


def write_keras(weights: dict[str, Tensor], file: Path) -> None:
    """As transformers' TFGPT2LMHeadModel.save_pretrained names and shapes them."""
    with h5py.File(file, "w") as opened:
        for key, value in weights.items():
            path = key.removeprefix("transformer.").replace("h.", "h_._", 1).replace(".", "/")
            if "ln_" in path:
                path = path.replace("weight", "gamma").replace("bias", "beta")
            elif path.endswith("bias"):
                value = value[None]
            path = path.replace("h_/_", "h_._").replace("wpe/weight", "wpe/embeddings")
            opened[f"transformer/tfgp_t2lm_head_model/transformer/{path}:0"] = value.numpy()


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded safetensors", "sharded bin", "h5"])
def test_every_form_loads_the_same_weights(tmp_path: Path, form: str) -> None:
    weights, folder = transformers_weights(), write_config(tmp_path)
    match form:
        case "safetensors":
            save_file(weights, folder / "model.safetensors")
        case "bin":
            torch.save(weights, folder / "pytorch_model.bin")
        case "sharded safetensors":
            write_sharded(weights, folder, "model", ".safetensors")
        case "sharded bin":
            write_sharded(weights, folder, "pytorch_model", ".bin")
        case "h5":
            write_keras(weights, folder / "tf_model.h5")
    state = loaded(folder).state_dict()
    for key, value in weights.items():
        found = state[key.removeprefix("transformer.")]
        assert torch.equal(found, value) or torch.equal(found, value.T)
    assert torch.equal(state["h.0.mlp.c_fc.weight"], weights["transformer.h.0.mlp.c_fc.weight"].T)


def test_safetensors_go_before_a_pickle(tmp_path: Path) -> None:
    save_file(transformers_weights(), write_config(tmp_path) / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    loaded(tmp_path)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    weights = {key: value.bfloat16() for key, value in transformers_weights().items()}
    save_file(weights, write_config(tmp_path) / "model.safetensors")
    decoder = loaded(tmp_path)
    assert decoder.wpe.weight.dtype == torch.float32
    assert torch.equal(decoder.wpe.weight, weights["transformer.wpe.weight"].float())


def test_rows_that_pad_a_vocabulary_are_dropped_and_missing_ones_refused(tmp_path: Path) -> None:
    weights = transformers_weights(vocab_size=64)
    save_file(weights, write_config(tmp_path) / "model.safetensors")
    assert torch.equal(loaded(tmp_path, 50).wte.weight, weights["transformer.wte.weight"][:50])
    with pytest.raises(
        InputError, match=r"wte.weight has shape \(64, 8\), .*\(65, 8\); its tokenizer is another"
    ):
        loaded(tmp_path, 65)


def test_another_vocabulary_is_not_taken_for_padding(tmp_path: Path) -> None:
    save_file(transformers_weights(vocab_size=1200), write_config(tmp_path) / "model.safetensors")
    with pytest.raises(InputError, match="its tokenizer is another one"):
        loaded(tmp_path, 100)


def test_a_checkpoint_file_names_which_of_several_is_meant(
    tmp_path: Path, shared: Callable[[str], Path]
) -> None:
    source = shared("parity") / "gpt2_tiny/openai"
    for file in source.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
        if file.name.startswith("model.ckpt"):
            (tmp_path / file.name.replace("ckpt", "ckpt-7")).write_bytes(b"?")
    note = tmp_path / "checkpoint"
    note.write_text('model_checkpoint_path: "/home/them/models/model.ckpt"\n')  # of the machine that wrote it
    loaded(tmp_path, 97)
    note.unlink()
    with pytest.raises(InputError, match=r"several checkpoints \(model.ckpt-7.index, model.ckpt.index\)"):
        loaded(tmp_path, 97)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**9}, "n_layer=1000000000, .*more than 1e.10 parameters"),
        ({"n_embd": 10**9}, "n_embd=1000000000, .*are not built"),
        ({"n_positions": 10**15}, "are not built"),
        ({"n_embd": "wide"}, "n_embd=wide, no positive number"),
        ({"n_head": 0}, "n_head=0, no positive number"),
        ({"n_head": 3}, "n_head=3 must divide"),
        ({"activation_function": "relu"}, "activation_function=relu; only gelu_new"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; only 1e-05"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; only True"),
    ],
)
def test_a_configuration_that_is_not_gpt2s_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loaded(write_config(tmp_path, **changes))


@pytest.mark.parametrize("content", ["[1]", "{", "[" * 100_000, "\udcff"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=r"config.json (cannot be read as|holds no) JSON"):
        gpt2_sizes(str(tmp_path))


def test_a_folder_without_weights_names_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither config.json nor hparams.json; model.decoder.name=DIR"):
        gpt2_sizes(str(tmp_path))
    with pytest.raises(InputError, match=r"none of model.safetensors, .*tf_model.h5 and no TensorFlow"):
        loaded(write_config(tmp_path))


def test_a_shard_outside_its_folder_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    save_file(transformers_weights(), tmp_path / "model-1.safetensors")
    index = {"weight_map": {"wte.weight": "../model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names '../model-1.safetensors', which is outside"):
        loaded(folder)


class Program:
    """What a pickle can make of its reading."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.mark.parametrize("write", [torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, 2))])
def test_a_pickle_that_is_a_program_is_refused_and_not_run(
    tmp_path: Path, write: Callable[[Any, Path], Any]
) -> None:
    write({"wte.weight": Program(tmp_path / "ran")}, write_config(tmp_path) / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is damaged, or holds more than weights"):
        loaded(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_huge_view_of_few_bytes_is_refused_before_it_is_copied(tmp_path: Path) -> None:
    weights = transformers_weights()
    weights["transformer.h.0.attn.c_attn.weight"] = torch.zeros(1, 1).expand(10**7, 10**7)
    torch.save(weights, write_config(tmp_path) / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"c_attn.weight has shape \(10000000, 10000000\)"):
        loaded(tmp_path)


def test_a_safetensors_header_larger_than_its_file_is_refused(tmp_path: Path) -> None:
    (write_config(tmp_path) / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"model.safetensors is damaged or no safetensors file") as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


def test_openais_names_are_those_of_transformers(shared: Callable[[str], Path]) -> None:
    folder = shared("parity") / "gpt2_tiny"
    theirs = load_file(folder / "hf_safetensors/model.safetensors")
    state = loaded(folder / "openai", 97).state_dict()
    for key, value in theirs.items():
        found = state[key.removeprefix("transformer.")].numpy()
        assert np.array_equal(found, value) or np.array_equal(found, value.T)
