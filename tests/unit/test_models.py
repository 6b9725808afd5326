"""The captioner: against transformers, against itself with and without cache, and as something that learns."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from safetensors.torch import load_file
from torch import Tensor

from efficap.batch import CaptionBatch
from efficap.errors import InputError
from efficap.models import linear
from efficap.models.bridge import Bridge, interpolated, projected
from efficap.models.build import build_model, load_first_weights
from efficap.models.cache import DecodingCache
from efficap.models.captioner import CaptionModel
from efficap.models.encoder import own_preprocessing
from efficap.models.gpt2 import GPT2
from efficap.models.linear import Linear
from efficap.models.pretrained.gpt2 import gpt2_state_dict
from efficap.training.losses import batch_loss

VOCAB = 97


def random_images(count: int, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)


def batch_of(images: Tensor, tokens: Tensor, lengths: Tensor) -> CaptionBatch:
    return CaptionBatch(images, tokens, lengths, [str(place) for place in range(len(images))])


def randomise(module: torch.nn.Module) -> None:
    """Every weight random, also those that start at zero or one, so that nothing is equal by being absent."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)


@pytest.fixture
def captioner() -> CaptionModel:
    model = build_model(tiny_model(), VOCAB).eval()
    randomise(model.decoder)
    return model


@pytest.fixture
def pair() -> tuple[GPT2, torch.nn.Module]:
    """This project's GPT-2 and transformers', with the same random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=3, n_head=4, add_cross_attention=True
    )
    theirs = GPT2LMHeadModel(config).eval()
    randomise(theirs)
    ours = GPT2(vocab_size=VOCAB, n_positions=24, n_embd=32, n_layer=3, n_head=4, dropout=0.1).eval()
    weights = gpt2_state_dict(theirs.state_dict())
    ours.load_state_dict(weights)  # strict: every weight has its counterpart
    return ours, theirs


def test_gpt2_equals_transformers_without_cache(pair: tuple[GPT2, torch.nn.Module]) -> None:
    ours, theirs = pair
    tokens, memory = torch.randint(0, VOCAB, (6, 11)), torch.randn(6, 5, 32)
    with torch.no_grad():
        expected = theirs(tokens, encoder_hidden_states=memory).logits
        actual = ours.logits(ours(tokens, ours.project_memory(memory)))
    assert (actual - expected).abs().max() < 2e-4


def test_gpt2_equals_transformers_with_cache(pair: tuple[GPT2, torch.nn.Module]) -> None:
    ours, theirs = pair
    tokens, memory = torch.randint(0, VOCAB, (4, 9)), torch.randn(4, 5, 32)
    past = None
    cache = DecodingCache(ours.project_memory(memory), max_tokens=9)
    with torch.no_grad():
        for t in range(9):
            output = theirs(
                tokens[:, t : t + 1], encoder_hidden_states=memory, past_key_values=past, use_cache=True
            )
            past = output.past_key_values
            cache.advance(1)
            assert (ours.step(tokens[:, t], cache) - output.logits[:, -1]).abs().max() < 2e-4


def test_gpt2_gives_the_published_logits(shared: object) -> None:
    folder = shared("parity") / "gpt2_tiny"  # type: ignore[operator]
    io = np.load(folder / "io.npz")
    decoder = GPT2(vocab_size=97, n_positions=24, n_embd=32, n_layer=2, n_head=4, dropout=0.0).eval()
    decoder.load_state_dict(
        gpt2_state_dict(load_file(folder / "hf_safetensors/model.safetensors")), strict=False
    )
    decoder.silence_cross_attention()
    tokens = torch.from_numpy(io["tokens"]).long()
    with torch.no_grad():
        logits = decoder.logits(decoder(tokens, decoder.project_memory(torch.randn(2, 5, 32))))
    assert np.abs(logits.numpy() - io["logits"]).max() < 2e-4


def test_a_silent_cross_attention_leaves_the_language_model_as_it_is() -> None:
    decoder = build_model(tiny_model(), VOCAB).decoder.eval()
    decoder.silence_cross_attention()
    tokens = torch.randint(0, VOCAB, (2, 7))
    one, other = (decoder(tokens, decoder.project_memory(torch.randn(2, 4, 32))) for _ in range(2))
    assert torch.equal(one, other)


def test_captions_of_a_picture_share_its_memory(captioner: CaptionModel) -> None:
    images, tokens = random_images(2), torch.randint(0, VOCAB, (2, 3, 8))
    together = captioner(images, tokens)  # (2, 3, 8, V)
    for k in range(3):
        alone = captioner(images, tokens[:, k : k + 1])
        assert torch.allclose(together[:, k : k + 1], alone, atol=1e-5)


def test_k_captions_in_a_batch_give_the_loss_and_gradients_of_k_pairs() -> None:
    captioner = build_model(tiny_model(), VOCAB).eval()  # BatchNorm in training would see other batches
    randomise(captioner.decoder)
    images, tokens = random_images(2), torch.randint(0, VOCAB, (2, 3, 8))
    lengths = torch.tensor([[8, 5, 3], [6, 8, 0]])

    def loss_and_gradients(images: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        captioner.zero_grad()
        loss = batch_loss(captioner, batch_of(images, tokens, lengths), label_smoothing=0.1)
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in captioner.parameters() if p.grad is not None]

    loss, gradients = loss_and_gradients(images, tokens, lengths)
    pairs = images.repeat_interleave(3, dim=0), tokens.reshape(6, 1, 8), lengths.reshape(6, 1)
    pair_loss, pair_gradients = loss_and_gradients(*pairs)
    assert abs(loss - pair_loss) < 1e-5
    for one, other in zip(gradients, pair_gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_those_of_padded_captions_and_all_logits(label_smoothing: float) -> None:
    captioner = build_model(tiny_model(), VOCAB).eval()
    randomise(captioner.decoder)
    images, tokens = random_images(3), torch.randint(0, VOCAB, (3, 2, 9))
    lengths = torch.tensor([[9, 2], [5, 0], [7, 8]])
    found = []
    for padded in (False, True):
        captioner.zero_grad()
        if padded:
            is_target = torch.arange(1, 9) < lengths[..., None]  # (B, K, T - 1)
            targets = tokens[..., 1:].masked_fill(~is_target, -100)
            logits = captioner(images, tokens[..., :-1])  # (B, K, T - 1, V)
            loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), label_smoothing=label_smoothing)
        else:
            loss = batch_loss(captioner, batch_of(images, tokens, lengths), label_smoothing=label_smoothing)
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in captioner.parameters() if p.grad is not None]))
    (loss, gradients), (expected, expected_gradients) = found
    assert abs(loss - expected) < 1e-5
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


def test_checkpointing_changes_neither_loss_nor_gradients_nor_statistics() -> None:
    images, tokens = random_images(2), torch.randint(0, VOCAB, (2, 3, 8))
    batch = batch_of(images, tokens, torch.tensor([[8, 5, 3], [6, 8, 0]]))
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        captioner = build_model(tiny_model(decoder__dropout=0.1), VOCAB).train()
        if checkpointed:
            captioner.checkpoint_gradients()
        loss = batch_loss(captioner, batch, label_smoothing=0.0)
        loss.backward()
        batch_loss(captioner, batch, label_smoothing=0.0).backward()  # the second step counts like the first
        statistics = [b for name, b in captioner.named_buffers() if ".running_" in name]
        found.append((loss.detach(), [p.grad for p in captioner.parameters()], statistics))
    (loss, gradients, statistics), (checkpointed_loss, checkpointed_gradients, checkpointed_statistics) = (
        found
    )
    assert torch.allclose(loss, checkpointed_loss)
    assert statistics
    for one, other in zip(statistics, checkpointed_statistics, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    for one, other in zip(gradients, checkpointed_gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_an_encoder_without_batch_norm_is_checkpointed_too() -> None:
    captioner = build_model(tiny_model(encoder__name="test_efficientnet_gn"), VOCAB).train()
    captioner.checkpoint_gradients()
    captioner.encode(random_images(2)).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in captioner.encoder.parameters())


@pytest.mark.slow
def test_compiled_parts_give_the_same_loss_gradients_and_names_of_weights() -> None:
    captioner = build_model(tiny_model(), VOCAB).eval()
    batch = batch_of(random_images(2), torch.randint(0, VOCAB, (2, 3, 8)), torch.full((2, 3), 8))

    def loss_and_gradients() -> list[Tensor]:
        loss = batch_loss(captioner, batch, label_smoothing=0.0)
        return [loss, *torch.autograd.grad(loss, list(captioner.parameters()))]

    expected, names = loss_and_gradients(), list(captioner.state_dict())
    captioner.compile_parts()
    # All of torch.compile but writing C++ and calling its compiler, a minute; test_caption_folder.py has this, too.
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        found = loss_and_gradients()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert list(captioner.state_dict()) == names


def test_cached_steps_equal_the_whole_sequence_with_reordered_rows(captioner: CaptionModel) -> None:
    images = random_images(2)
    first, rest = torch.randint(0, VOCAB, (2, 1)), torch.randint(0, VOCAB, (6, 6))
    parents = torch.tensor([0, 0, 0, 1, 1, 1])
    shuffle = torch.tensor([2, 0, 1, 5, 5, 3])
    with torch.no_grad():
        state = captioner.start(images, max_tokens=7)
        state(first[:, 0], None)
        rows = torch.cat([first[parents], rest], dim=1)  # (6, 7)
        state(rows[:, 1], parents)
        state(rows[:, 2], None)
        logits = state(rows[shuffle, 3], shuffle)
        whole = captioner(images, rows[shuffle, :4].view(2, 3, 4))[:, :, -1].flatten(0, 1)
    assert (logits - whole).abs().max() < 1e-5


def test_gradients_reach_the_pixels(captioner: CaptionModel) -> None:
    images = random_images(1).float().requires_grad_()
    captioner(images, torch.randint(0, VOCAB, (1, 2, 5))).sum().backward()
    assert images.grad is not None
    assert (images.grad.abs() > 0).float().mean() > 0.9


def test_one_batch_is_overfitted() -> None:
    captioner = build_model(tiny_model(decoder__n_embd=64), VOCAB).train()
    images, tokens = random_images(4), torch.randint(0, VOCAB, (4, 2, 8))
    tokens[:, 1] = tokens[:, 0]  # two different captions of one picture could not both be learned by heart
    lengths = torch.full((4, 2), 8)
    tokens[..., 0] = 0
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=3e-3)
    for _ in range(150):
        loss = batch_loss(captioner, batch_of(images, tokens, lengths), label_smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            break
    assert loss < 0.05


def test_a_frozen_encoder_keeps_its_statistics_and_gets_no_gradients() -> None:
    captioner = build_model(tiny_model(encoder__frozen=True), VOCAB).train()
    before = {key: value.clone() for key, value in captioner.encoder.state_dict().items()}
    captioner(random_images(4), torch.randint(0, VOCAB, (4, 1, 5))).sum().backward()
    assert all(torch.equal(before[key], value) for key, value in captioner.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in captioner.encoder.parameters())
    assert captioner.bridge.project.weight.grad is not None


@pytest.mark.parametrize("name", ["efficientnet_b0", "efficientnet_b0_gn", "mnasnet_small"])
def test_residual_blocks_that_start_from_nothing_pass_on_their_input_and_learn(name: str) -> None:
    model = tiny_model()
    model["encoder"]["name"] = name
    captioner = build_model(model, VOCAB)
    load_first_weights(captioner, model)
    blocks = [block for block in captioner.encoder.modules() if getattr(block, "has_skip", False)]
    seen = []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append(torch.equal(inputs[0], output)))
    (captioner.encoder(random_images(2)) ** 2).mean().backward()
    assert len(seen) == len(blocks) > 0
    assert all(seen)
    for block in blocks:
        named = {key: p for key, p in block.named_parameters() if re.fullmatch(r"bn\d\.weight", key)}
        [silent] = [scale for scale in named.values() if not scale.any()]
        assert silent.grad is not None
        assert silent.grad.any()


def test_the_encoder_normalises_with_the_mean_and_std_it_was_given() -> None:
    captioner = build_model(tiny_model(encoder__mean=[0.1, 0.2, 0.3], encoder__std=[0.5, 0.6, 0.7]), VOCAB)
    images = random_images(2)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    expected = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    encoder = captioner.encoder.eval()
    assert torch.allclose(encoder(images), encoder.backbone.forward_features(expected), atol=1e-4)


def test_positions_are_interpolated_to_another_picture_size(captioner: CaptionModel) -> None:
    assert captioner.encode(random_images(1, size=64)).shape == (1, 4, 32)
    assert captioner.encode(random_images(1, size=96)).shape == (1, 9, 32)


@pytest.mark.parametrize(("stride", "step"), [(16, 2), (8, 4)])
def test_a_finer_latent_map_has_the_positions_of_the_coarse_one_and_those_between(
    stride: int, step: int
) -> None:
    coarse = build_model(tiny_model(), VOCAB).encoder.eval()
    fine = build_model(tiny_model(encoder__output_stride=stride), VOCAB).encoder.eval()
    fine.load_state_dict(coarse.state_dict())
    for module in (*coarse.modules(), *fine.modules()):
        if hasattr(module, "se"):
            module.se = torch.nn.Identity()  # it sees the whole map, which is another one
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    features = fine(images)
    assert features.shape[-2:] == (3 * step, 3 * step)
    assert torch.allclose(features[..., ::step, ::step], coarse(images), atol=1e-6)
    assert not torch.allclose(features[..., 1::step, ::step], coarse(images), atol=1e-3)


@pytest.mark.parametrize("encoder_learns", [True, False])
def test_what_is_normalised_and_projected_has_torchs_values_and_gradients(encoder_learns: bool) -> None:
    norm, project = torch.nn.LayerNorm(6), Linear(6, 4)
    for module in (norm, project):
        randomise(module)
    x = torch.randn(2, 5, 6, requires_grad=encoder_learns)
    learning = [*norm.parameters(), *project.parameters(), *([x] if encoder_learns else [])]
    slope = torch.randn(2, 5, 4)
    sides = []
    for y in (projected(x, norm, project), F.linear(norm(x), project.weight, project.bias)):
        sides.append([y, *torch.autograd.grad(y, learning, slope)])
    for ours, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(projected(x, norm, project), sides[1][0])


def test_a_packed_projection_is_computed_where_gradients_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    norm, project, x = torch.nn.LayerNorm(6), Linear(6, 4), torch.randn(2, 5, 6)
    expected = project(norm(x))
    monkeypatch.setattr(linear, "mkl_is_slow", lambda: True)
    project.pack()
    assert project.weight.is_mkldnn
    torch.testing.assert_close(projected(x, norm, project), expected)


def test_interpolated_positions_keep_a_linear_ramp() -> None:
    bridge = Bridge(channels=8, grid=(8, 8), width=4, n_blocks=0, n_heads=1, dropout=0.0)
    ramp = torch.arange(8.0).repeat_interleave(8)[:, None].expand(64, 4)
    bridge.positions.weight.data.copy_(ramp)
    larger = interpolated(bridge.positions.weight, bridge.grid, (16, 16)).unflatten(0, (16, 16))[..., 0]
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5  # sample centres of twice as many rows
    assert torch.allclose(larger[4:12, 8], expected[4:12], atol=0.06)  # the cubic follows a line within 0.05


def test_preprocessing_comes_from_the_weights_not_from_the_name() -> None:
    assert own_preprocessing("tf_efficientnetv2_s.in21k_ft_in1k")["mean"] == [0.5, 0.5, 0.5]
    assert own_preprocessing("efficientnet_b0.ra_in1k")["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 16}, "model.image_size=16 must be at least 32"),
        ({"encoder__output_stride": 12}, "model.encoder.output_stride=12 pixels must be one of 32, 16, 8"),
        ({"bridge__n_heads": 5}, "model.bridge.n_heads=5 must divide .*model.decoder.n_embd=32"),
        ({"decoder__n_head": 3}, "model.decoder.n_head=3 must divide model.decoder.n_embd=32"),
        (
            {"encoder__name": "efficientnet_bo"},
            "model.encoder.name=efficientnet_bo .*nearest: efficientnet_b",
        ),
        ({"encoder__name": "efficientnet_b0.nope"}, "no weights tagged 'nope'; its tags: .*ra_in1k"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(tiny_model(**changes), VOCAB)


def test_more_tokens_than_the_decoder_has_positions_are_refused(captioner: CaptionModel) -> None:
    with pytest.raises(InputError, match=r"decoding.max_tokens=25 is more than .*n_positions=24"):
        captioner.start(random_images(1), max_tokens=25)


def test_cross_attention_weights_are_those_that_the_forward_pass_uses(captioner: CaptionModel) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(0, 50, (2, 3, 5))
    weights = captioner.cross_attention(images, tokens)  # (B, K, L, H, T, N)
    layers, heads = len(captioner.decoder.h), captioner.decoder.h[0].attn.n_head
    memory = captioner.encode(images)
    assert weights.shape == (2, 3, layers, heads, 5, memory.shape[1])
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    config = GPT2Config(
        vocab_size=captioner.decoder.wte.num_embeddings,
        n_positions=captioner.decoder.wpe.num_embeddings,
        n_embd=memory.shape[2],
        n_layer=layers,
        n_head=heads,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    theirs = GPT2LMHeadModel(config).eval()
    state = theirs.transformer.state_dict()
    for name, weight in captioner.decoder.state_dict().items():
        state[name].copy_(weight.T if weight.ndim == 2 and name.startswith("h.") else weight)
    output = theirs(
        tokens.flatten(0, 1),
        encoder_hidden_states=memory.repeat_interleave(3, dim=0),
        output_attentions=True,
    )
    expected = torch.stack(output.cross_attentions, dim=1)  # (R, L, H, T, N)
    torch.testing.assert_close(weights.flatten(0, 1), expected, atol=1e-5, rtol=1e-4)
