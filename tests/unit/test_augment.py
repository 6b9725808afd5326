"""Pictures that grow, words that are replaced, an encoder that wakes up, learning rates that fade with depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from toys import GREEDY

from efficap.batch import CaptionBatch
from efficap.decoding import build_decoding
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.training.augment import (
    choose_hidden,
    drop_tokens,
    growing_size,
    hide_words,
    read_once,
    resized,
)
from efficap.training.losses import batch_loss, memory_loss
from efficap.training.module import CaptionModule
from efficap.training.optim import build_optimizer, parameter_groups

LR = {"encoder": 1.0, "bridge": 1.0, "decoder": 1.0}


def test_pictures_grow_in_steps_of_a_position_and_are_full_for_the_last_quarter() -> None:
    sizes = [growing_size(64, 160, share / 100) for share in range(101)]
    assert sizes == sorted(sizes)
    assert set(sizes) == {64, 96, 128, 160}
    assert sizes[0] == 64
    assert set(sizes[75:]) == {160}
    assert growing_size(128, 128, 0.1) == 128
    assert growing_size(64, 100, 1.0) == 100


def test_a_resized_picture_keeps_its_mean_and_type() -> None:
    flat = torch.full((1, 3, 128, 128), 200, dtype=torch.uint8)
    flat[..., :64] = 100
    small = resized(flat, 64)
    assert small.shape == (1, 3, 64, 64)
    assert small.dtype == torch.uint8
    assert set(small[..., :30].unique().tolist()) == {100}
    assert set(small[..., 34:].unique().tolist()) == {200}
    assert resized(flat, 128) is flat


def test_a_share_of_the_words_is_replaced_but_never_bos() -> None:
    torch.manual_seed(0)
    tokens = torch.full((50, 5, 40), 7)
    read = drop_tokens(tokens, 0.3, 1000)
    assert (read[..., 0] == 7).all()
    assert abs(float((read[..., 1:] != 7).float().mean()) - 0.3) < 0.02
    assert torch.equal(drop_tokens(tokens, 0.0, 1000), tokens)


def test_a_share_of_the_captions_is_hidden_as_a_whole() -> None:
    torch.manual_seed(0)
    tokens = torch.arange(40).expand(50, 5, 40)
    is_hidden = choose_hidden(tokens, 0.3)
    read = hide_words(tokens, is_hidden)
    assert torch.equal((read == 0).all(dim=-1), is_hidden)
    assert torch.equal(read[~is_hidden], tokens[~is_hidden])
    assert abs(float(is_hidden.float().mean()) - 0.3) < 0.1
    assert not choose_hidden(tokens, 0.0).any()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hidden_captions_of_a_picture_are_read_once_with_the_loss_and_the_gradients_of_each(
    smoothing: float,
) -> None:
    torch.manual_seed(0)
    captioner = build_model(tiny_model(), 97)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    lengths = torch.tensor([[4, 9, 6], [9, 5, 0], [3, 4, 7], [8, 8, 8]])
    tokens = torch.randint(3, 97, (4, 3, 9))
    tokens[..., 0] = 1
    tokens[1, 2] = 2  # padding: there is no such caption
    batch = CaptionBatch(images, tokens, lengths, list("abcd"))
    is_hidden = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.bool)
    read = hide_words(batch.tokens[..., :-1], is_hidden)
    fewer = read_once(read, batch.places, batch.targets, is_hidden)
    # 5 of the longer of two hidden ones and 8 of one that is read; 8; all; 7 and 7.
    assert len(fewer[1]) == (5 + 8) + 8 + (2 + 3 + 6) + (7 + 7)
    assert fewer[0].shape[1] == 3
    found = []
    for captions in ((read, batch.places, batch.targets), fewer):
        memory = captioner.encode(images)
        loss = memory_loss(captioner, memory, *captions, label_smoothing=smoothing)
        found.append((loss, *torch.autograd.grad(loss, list(captioner.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_model_that_is_told_no_words_learns_from_pictures_and_places_alone() -> None:
    captioner = build_model(tiny_model(), 97).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    first = torch.tensor([[[1, 5, 6, 2]], [[1, 7, 8, 2]]])
    batch = CaptionBatch(images, first, torch.full((2, 1), 4), ["a", "b"])
    blind = batch_loss(captioner, batch, label_smoothing=0.0, hidden_captions=1.0)
    logits = captioner(images, torch.ones(2, 1, 3, dtype=torch.int64))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), first[..., 1:].flatten())
    assert torch.allclose(blind, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "shares"),
    [(0.5, [0.5, 0.5, 0.5, 0.5]), ([1.0, 0.4], [1.0, 0.7, 0.4, 0.4]), ([0.0, 0.8], [0.0, 0.4, 0.8, 0.8])],
)
def test_the_share_of_hidden_captions_changes_evenly_over_the_training(
    setting: float | list[float], shares: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = build_model(tiny_model(), 97)
    decoding = build_decoding(GREEDY)
    module = CaptionModule(
        captioner, None, decoding, optimizer={}, label_smoothing=0.0, hidden_captions=setting
    )
    given: list[float] = []
    monkeypatch.setattr(
        "efficap.training.module.batch_loss",
        lambda *_, hidden_captions, **__: given.append(hidden_captions) or torch.zeros(()),
    )
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    batch = CaptionBatch(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        torch.ones(1, 1, 3, dtype=torch.int64),
        torch.tensor([[3]]),
        ["a"],
    )
    for progress in (0.0, 0.5, 1.0, 1.1):  # a clock may be a little over
        monkeypatch.setattr(module, "progress", lambda _, now=progress: now)
        module.training_step(batch, 0)
    assert given == pytest.approx(shares)


def test_learning_rates_fade_with_depth_and_not_in_what_starts_fresh() -> None:
    captioner = build_model(tiny_model(decoder__n_layer=3), 97)
    groups = parameter_groups(captioner, lr=LR, weight_decay=0.0, layer_decay=0.5)
    lr = {id(p): group["lr"] for group in groups for p in group["params"]}
    decoder, backbone = captioner.decoder, captioner.encoder.backbone
    stages = len(backbone.blocks)
    assert lr[id(decoder.ln_f.weight)] == 1
    assert [lr[id(block.attn.c_attn.weight)] for block in decoder.h] == [0.25, 0.5, 1]
    assert lr[id(decoder.wte.weight)] == 0.125
    assert {lr[id(block.crossattention.c_attn.weight)] for block in decoder.h} == {1}
    assert {lr[id(p)] for p in captioner.bridge.parameters()} == {1}
    assert lr[id(backbone.conv_head.weight)] == 1
    assert lr[id(backbone.conv_stem.weight)] == 0.5**stages
    assert lr[id(next(backbone.blocks[0].parameters()))] == 0.5 ** (stages - 1)
    assert sum(len(group["params"]) for group in groups) == len(list(captioner.parameters()))


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_layer_decay_that_is_none_is_refused(value: float) -> None:
    captioner = build_model(tiny_model(), 97)
    settings = {"betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.0, "warmup_steps": 1, "final_lr": 0.0}
    with pytest.raises(InputError, match=f"optimizer.layer_decay={value} must be above 0"):
        build_optimizer(captioner, lambda _: 0.0, lr=LR, layer_decay=value, fused=True, **settings)


def test_a_sleeping_encoder_keeps_weights_and_statistics_and_then_learns() -> None:
    encoder = build_model(tiny_model(), 97).train().encoder
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    encoder.freeze(True)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    assert not encoder(images).requires_grad
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    encoder.freeze(False)
    encoder(images).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.backbone.parameters())
    assert any(not torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_smoothing": 1.0}, "training.label_smoothing=1.0 must be at least 0 and below 1"),
        ({"token_dropout": -0.1}, "training.token_dropout=-0.1 must be at least 0 and below 1"),
        ({"hidden_captions": 1.0}, "training.hidden_captions=1.0 must be at least 0 and below 1; or two"),
        ({"hidden_captions": [1.0, 1.0]}, r"training.hidden_captions=\[1.0, 1.0\] must be at least 0"),
        ({"hidden_captions": [0.5, -0.5]}, r"training.hidden_captions=\[0.5, -0.5\] must be at least 0"),
        ({"start_size": 16}, "training.start_size=16 must be at least 32 pixels"),
        ({"unfreeze_encoder_at": 2}, "training.unfreeze_encoder_at=2 must be at least 0 and below 1"),
    ],
)
def test_an_option_out_of_its_range_is_named(option: dict[str, Any], message: str) -> None:
    settings = {"label_smoothing": 0.1, **option}
    with pytest.raises(InputError, match=message):
        CaptionModule(build_model(tiny_model(), 97), None, None, optimizer={}, **settings)
