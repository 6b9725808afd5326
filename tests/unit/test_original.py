"""The original TensorFlow project's models: its own numbers, and Keras's EfficientNetV2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from toys import BEAM, captions, ids, run

from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.captioner import DecodingState
from efficap.models.encoder import ImageEncoder
from efficap.models.gpt2 import GPT2
from efficap.models.original import DECODER, OriginalBridge
from efficap.models.pretrained.hdf5 import read_hdf5
from efficap.models.pretrained.keras_efficientnet import efficientnet_state_dict, mean_and_std
from efficap.models.pretrained.original import bridge_state_dict, decoder_state_dict, variables
from efficap.models.pretrained.tf_checkpoint import read_tf_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from make_keras_efficientnet import FILE, seeded_weights

BOS = 97
Weights = dict[str, np.ndarray]


@pytest.fixture(params=["hdf5", "checkpoint"])
def weights(request: pytest.FixtureRequest, shared: Callable[[str], Path]) -> tuple[Weights, Weights]:
    """The encoder's and the decoder's, from either form of file."""
    folder = shared("parity") / "original_tiny"
    if request.param == "hdf5":
        return variables(read_hdf5(folder / "encoder.h5")), variables(read_hdf5(folder / "decoder.h5"))
    folder = folder / "tf_checkpoint"
    return variables(read_tf_checkpoint(folder / "encoder")), variables(
        read_tf_checkpoint(folder / "decoder")
    )


@pytest.fixture
def numbers(shared: Callable[[str], Path]) -> dict[str, Tensor]:
    arrays = np.load(shared("parity") / "original_tiny" / "io.npz")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def original_decoder(weights: Weights, *, past: bool = True) -> GPT2:
    arithmetic = DECODER["original" if past else "original_no_past"]
    decoder = GPT2(
        vocab_size=98, n_positions=24 - past, n_embd=32, n_layer=2, n_head=4, dropout=0.0, **arithmetic
    )
    decoder.load_state_dict(decoder_state_dict(weights, past=past))
    return decoder.eval()


@torch.no_grad()
def test_the_bridge_makes_the_originals_memory(
    weights: tuple[Weights, Weights], numbers: dict[str, Tensor]
) -> None:
    state, others = bridge_state_dict(weights[0])
    assert not others
    bridge = OriginalBridge(channels=64, grid=(3, 3), width=32, n_blocks=2, n_heads=4, dropout=0.0).eval()
    bridge.load_state_dict(state)
    memory = bridge(numbers["latent"].permute(0, 3, 1, 2))  # (B, C, h, w)
    assert (memory - numbers["memory"]).abs().max() < 2e-4


@pytest.mark.parametrize(("past", "logits"), [(True, "logits_zero_past"), (False, "logits_no_past")])
@torch.no_grad()
def test_the_decoder_gives_the_originals_logits(
    weights: tuple[Weights, Weights], numbers: dict[str, Tensor], past: bool, logits: str
) -> None:
    decoder = original_decoder(weights[1], past=past)
    hidden = decoder(numbers["tokens"].long(), decoder.project_memory(numbers["memory"]))
    assert (decoder.logits(hidden) - numbers[logits]).abs().max() < 2e-4


@pytest.mark.parametrize("past", [True, False])
@torch.no_grad()
def test_the_cache_holds_the_empty_place(
    weights: tuple[Weights, Weights], numbers: dict[str, Tensor], past: bool
) -> None:
    decoder = original_decoder(weights[1], past=past)
    expected = numbers["logits_zero_past" if past else "logits_no_past"]  # (B, T, V)
    state = DecodingState(decoder, numbers["memory"], max_tokens=7)
    for place, newest in enumerate(numbers["tokens"].long().T):
        assert (state(newest, None) - expected[:, place]).abs().max() < 2e-4


class ReadAgain:
    """A step function without a cache: each row reads all its tokens, with a copy of its picture's memory."""

    def __init__(self, decoder: GPT2, memory: Tensor) -> None:
        self.decoder, self.memory = decoder, memory
        self.tokens = torch.empty(len(memory), 0, dtype=torch.int64)  # (R, T)

    def __call__(self, ids: Tensor, parents: Tensor | None, images: Tensor | None) -> Tensor:
        if parents is not None:
            of_row = self.memory.repeat_interleave(len(self.tokens) // len(self.memory), dim=0)[parents]
            self.memory = self.memory if images is None else self.memory[images]
            self.tokens = self.tokens[parents]
            assert torch.equal(of_row, self.memory.repeat_interleave(len(of_row) // len(self.memory), dim=0))
        self.tokens = torch.cat((self.tokens, ids[:, None]), dim=1)
        rows = self.memory.repeat_interleave(len(self.tokens) // len(self.memory), dim=0)  # (R, N, D)
        hidden = self.decoder(self.tokens, self.decoder.project_memory(rows))
        return self.decoder.logits(hidden[:, -1])


@pytest.mark.parametrize("num_beams", [1, 3, 5])
@torch.no_grad()
def test_beams_with_and_without_the_cache_agree(
    weights: tuple[Weights, Weights], numbers: dict[str, Tensor], num_beams: int
) -> None:
    decoder = original_decoder(weights[1])
    memory = torch.cat([numbers["memory"], numbers["memory"].flip(1), torch.randn(4, 9, 32)])
    settings = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_tokens": 20}
    decoding = build_decoding(BEAM | settings)
    cached, again = (
        run(decoding, step, ids(8), bos_id=BOS, eos_id=5)
        for step in (DecodingState(decoder, memory, 20), ReadAgain(decoder, memory))
    )
    assert captions(cached) == captions(again)
    assert torch.allclose(cached.scores, again.scores, atol=1e-4)


def test_an_unknown_weight_and_a_missing_table_are_named(weights: tuple[Weights, Weights]) -> None:
    with pytest.raises(InputError, match=r"a weight h/extra that no decoder"):
        decoder_state_dict(weights[1] | {"h/extra": np.zeros(3)})
    with pytest.raises(InputError, match=r"lacks wsp"):
        decoder_state_dict({name: value for name, value in weights[1].items() if not name.endswith("wsp")})


@pytest.fixture(scope="module")
def keras() -> dict[str, np.ndarray]:
    return dict(np.load(FILE))


def keras_weights(keras: dict[str, np.ndarray]) -> Weights:
    shapes = [tuple(int(size) for size in shape if size) for shape in keras["shapes"]]
    return variables(seeded_weights(keras["names"], shapes))


@torch.no_grad()
def test_kerass_efficientnet_gives_the_same_feature_map(keras: dict[str, np.ndarray]) -> None:
    architecture, state = efficientnet_state_dict(keras_weights(keras))
    assert architecture == "tf_efficientnetv2_s"
    encoder = ImageEncoder(
        name=architecture,
        image_size=64,
        frozen=False,
        drop_path_rate=0.0,
        output_stride=32,
        **mean_and_std(architecture),
    ).eval()
    encoder.backbone.load_state_dict(state)
    features = encoder(torch.from_numpy(keras["images"]).permute(0, 3, 1, 2))  # (B, C, h, w)
    assert np.abs(features.permute(0, 2, 3, 1).numpy() - keras["features"]).max() < 1e-3
    assert keras["features"].std() > 0.5  # and not for being small


def test_places_in_a_checkpoint_say_the_same_as_names(keras: dict[str, np.ndarray]) -> None:
    named = keras_weights(keras)
    places: dict[str, int] = {}
    for name in named:  # in the model's order
        places.setdefault(name.split("/")[0], len(places))
    numbered = {
        f"layer_with_weights-0/layer_with_weights-{places[layer]}/{variable}": value
        for (layer, variable), value in ((name.split("/"), value) for name, value in named.items())
    }
    shuffled = dict(sorted(numbered.items()))  # as a checkpoint lists them
    (_, expected), (_, state) = efficientnet_state_dict(named), efficientnet_state_dict(shuffled)
    assert expected.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in expected.items())


def test_a_kerass_efficientnet_that_lacks_or_has_too_much_is_refused(keras: dict[str, np.ndarray]) -> None:
    named = keras_weights(keras)
    lacking = {name: value for name, value in named.items() if name != "top_bn/beta"}
    with pytest.raises(InputError, match=r"1 weights are missing for tf_efficientnetv2_s"):
        efficientnet_state_dict(lacking)
    with pytest.raises(InputError, match=r"block9a_bn/beta has no place in tf_efficientnetv2_s"):
        efficientnet_state_dict(named | {"block9a_bn/beta": np.zeros(3)})


def test_the_originals_arithmetic_learns_and_ignores_padding() -> None:
    model = build_model(tiny_model(arithmetic="original"), 97)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(0, 97, (2, 2, 9))
    lengths = torch.tensor([[9, 5], [4, 7]])
    valid = torch.arange(9) < lengths[..., None]  # (B, K, T)
    model.eval()
    memory = model.encode(images)
    packed = model.hidden_states(memory, tokens, valid.flatten().nonzero()[:, 0])  # (n, D)
    padded = model.decoder(tokens.flatten(0, 1), model.decoder.project_memory(memory))  # (B*K, T, D)
    assert torch.allclose(packed, padded[valid.flatten(0, 1)], atol=1e-5)
    packed.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.bridge.parameters())


def test_the_originals_positions_are_interpolated_between_its_constant_rows() -> None:
    model = build_model(tiny_model(arithmetic="original"), 97)
    larger = model.bridge._positions_for((3, 3))  # (1 + 9 + 1, D)
    table = model.bridge.positions.weight
    assert larger.shape == (11, 32)
    assert torch.equal(larger[[0, -1]], table[[0, -1]])


def test_an_unknown_arithmetic_is_named() -> None:
    with pytest.raises(InputError, match=r"model.arithmetic=new must be one of gpt2, original"):
        build_model(tiny_model(arithmetic="new"), 97)
