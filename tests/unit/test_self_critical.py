"""Self-critical training: its gradient against REINFORCE spelled out, its baselines, its samples and its reward."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model
from toys import BEAM, GREEDY

from efficap.batch import CaptionBatch
from efficap.data.dataset import collate_captions
from efficap.decoding import Nucleus, build_decoding
from efficap.errors import InputError
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.tokenizer import CaptionTokenizer
from efficap.training.losses import batch_loss
from efficap.training.objective import build_module, check_objective
from efficap.training.reward import above_the_others, caption_reward
from efficap.training.self_critical import SelfCriticalModule

CAPTIONS = [["1 2 3", "1 2 4 5"], ["6 2 3", "6 6 2 1 4 4 3"], ["5 4"]]
SCST = {
    "samples": 3,
    "sampling": "random",
    "baseline": "leave_one_out",
    "temperature": 1.0,
    "lr_scale": 0.1,
}


class Digits:
    """A tokenizer of so few words that samples of random weights have some of the references'."""

    bos_id = eos_id = pad_id = 0
    vocab_size = 8

    def encode(self, captions: list[str], max_tokens: int) -> tuple[list[list[int]], int]:
        return [[0, *map(int, text.split()), 0] for text in captions], 0


class OfCaptions:
    """Data, as far as rewards ask."""

    max_tokens = 20

    def training_captions(self) -> list[str]:
        return [text for texts in CAPTIONS for text in texts]


@pytest.fixture
def tokenizer() -> Any:
    return Digits()


@pytest.fixture
def captioner(tokenizer: CaptionTokenizer) -> CaptionModel:
    """Random weights that look at the picture, with dropout."""
    torch.manual_seed(0)
    captioner = build_model(tiny_model(decoder__dropout=0.3, bridge__dropout=0.3), tokenizer.vocab_size)
    for block in captioner.decoder.h:
        torch.nn.init.normal_(block.crossattention.c_proj.weight, std=0.5)
    return captioner


@pytest.fixture
def batch(tokenizer: CaptionTokenizer) -> CaptionBatch:
    ids = [[np.array(c, np.int32) for c in tokenizer.encode(texts, 20)[0]] for texts in CAPTIONS]
    tokens, lengths = collate_captions(ids, tokenizer.pad_id)
    images = torch.randint(0, 256, (3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    return CaptionBatch(images.to(torch.uint8), tokens, lengths, ["one", "two", "three"])


def build(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, seed: int = 0, **changes: Any
) -> SelfCriticalModule:
    lr = {"encoder": 1.0, "bridge": 2.0, "decoder": 3.0}
    module = SelfCriticalModule(
        captioner,
        tokenizer,
        build_decoding({**GREEDY, "max_tokens": 12}),
        optimizer={"lr": lr},
        reward=caption_reward(OfCaptions().training_captions(), tokenizer, OfCaptions.max_tokens),
        seed=seed,
        **{**SCST, **changes},
    )
    module.logged = {}  # type: ignore[assignment]
    module.log = lambda name, value, **_: module.logged.update({name: float(torch.as_tensor(value).detach())})  # type: ignore[method-assign,operator]
    return module


def samples_of(module: SelfCriticalModule, batch: CaptionBatch) -> Any:
    with torch.no_grad():
        return module._written(module.captioner.encode(batch.images), batch.image_ids)


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
@pytest.mark.parametrize(("sampling", "temperature"), [("random", 1.0), ("random", 0.7), ("beam", 1.0)])
def test_the_gradient_is_reinforces(
    captioner: CaptionModel,
    tokenizer: CaptionTokenizer,
    batch: CaptionBatch,
    baseline: str,
    sampling: str,
    temperature: float,
) -> None:
    module = build(captioner, tokenizer, baseline=baseline, sampling=sampling, temperature=temperature)
    module.training_step(batch, 0).backward()
    got = {name: p.grad.clone() for name, p in captioner.named_parameters() if p.grad is not None}
    captioner.zero_grad()

    sampled, greedy = samples_of(module, batch)
    total, words, rewards = torch.zeros(()), 0, []
    for image, texts in enumerate(CAPTIONS):
        references = [ids[1:] for ids in tokenizer.encode(texts, 20)[0]]
        captions = [
            ids[:length]
            for ids, length in zip(
                sampled.tokens[image].tolist(), sampled.lengths[image].tolist(), strict=True
            )
        ]
        scores = [float(module.reward([[ids[1:]]], [references])[0, 0]) for ids in captions]
        rewards += scores
        for number, ids in enumerate(captions):
            if greedy is None:
                others = [score for other, score in enumerate(scores) if other != number]
                base = sum(others) / len(others)
            else:
                best = greedy.tokens[image, 0, 1 : greedy.lengths[image, 0]].tolist()
                base = float(module.reward([[best]], [references])[0, 0])
            logits = captioner(batch.images[image : image + 1], torch.tensor([[ids]]))[0, 0, :-1]
            log_probs = (logits / temperature).log_softmax(dim=-1)
            log_p = log_probs.gather(1, torch.tensor(ids[1:])[:, None]).sum()
            total, words = total - (scores[number] - base) * log_p, words + len(ids) - 1
    (total / words).backward()

    assert {len(ids) for ids in sampled.lengths.tolist()} == {3}
    assert int(sampled.lengths.min()) < int(sampled.lengths.max()), "of several lengths"
    assert max(rewards) > 0
    for name, parameter in captioner.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert module.logged["train/reward"] == pytest.approx(np.mean(rewards), rel=1e-5)
    assert module.logged["train/length"] == pytest.approx(float(sampled.lengths.float().mean()))
    assert module.logged["train/ended"] == pytest.approx(float(sampled.ended.float().mean()))


def test_a_sample_counts_above_the_mean_of_the_others() -> None:
    rewards = np.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    np.testing.assert_allclose(above_the_others(rewards), [[1 - 4, 2 - 3.5, 6 - 1.5], [0, 0, 0]])


@pytest.mark.parametrize("baseline", ["leave_one_out", "greedy"])
def test_a_picture_is_encoded_once(
    captioner: CaptionModel,
    tokenizer: CaptionTokenizer,
    batch: CaptionBatch,
    baseline: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    encode = captioner.encode
    monkeypatch.setattr(captioner, "encode", lambda images: calls.append(len(images)) or encode(images))
    build(captioner, tokenizer, baseline=baseline).training_step(batch, 0)
    assert calls == [3]


def test_samples_are_decided_by_seed_step_and_picture(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, batch: CaptionBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = samples_of(build(captioner, tokenizer), batch)[0].tokens
    again = samples_of(build(captioner, tokenizer), batch)[0].tokens
    assert torch.equal(first, again)
    assert not torch.equal(first, samples_of(build(captioner, tokenizer, seed=1), batch)[0].tokens)
    monkeypatch.setattr(SelfCriticalModule, "global_step", 1)
    assert not torch.equal(first, samples_of(build(captioner, tokenizer), batch)[0].tokens)


def test_beams_write_the_captions_that_beam_search_returns(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, batch: CaptionBatch
) -> None:
    sampled, _ = samples_of(build(captioner, tokenizer, sampling="beam"), batch)
    beam = build_decoding({**BEAM, "max_tokens": 12, "num_beams": 3, "num_return_sequences": 3})
    with torch.no_grad():
        step = captioner.start(batch.images, 12)
        expected = beam.decode(step, batch.image_ids, bos_id=0, eos_id=0, device="cpu")
    assert torch.equal(sampled.tokens, expected.tokens)
    assert len({tuple(ids) for ids in sampled.tokens[0].tolist()}) == 3


def test_words_are_drawn_by_their_probability(captioner: CaptionModel, tokenizer: CaptionTokenizer) -> None:
    module = build(captioner, tokenizer, temperature=0.7)
    scores = torch.tensor([1.0, -torch.inf, 3.0, 2.0, 0.0, -torch.inf])
    uniform = (torch.arange(10_000)[:, None] + 0.5) / 10_000
    drawn = module.sampling._draw(scores.expand(10_000, -1), uniform).bincount(minlength=6) / 10_000
    torch.testing.assert_close(drawn, (scores / 0.7).softmax(dim=0), rtol=0, atol=2e-4)


def test_a_caption_without_its_end_is_rewarded_less(tokenizer: CaptionTokenizer) -> None:
    reward = caption_reward([text for texts in CAPTIONS for text in texts], tokenizer, 20)
    [reference] = tokenizer.encode(["1 2 3"], 20)[0]
    ended, cut = reward([[reference[1:], reference[1:-1]]], [[reference[1:]]])[0]
    assert ended == pytest.approx(10.0)
    assert cut < 9


def test_samples_and_their_log_probabilities_come_from_the_model_that_writes(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, batch: CaptionBatch
) -> None:
    """Dropout is off and BatchNorm's statistics stay, though Lightning sets a module to training."""
    module = build(captioner, tokenizer).train()
    before = copy.deepcopy(dict(captioner.named_buffers()))
    module.training_step(batch, 0)
    assert before.keys() & {"encoder.backbone.bn1.running_mean"}
    for name, value in captioner.named_buffers():
        assert torch.equal(before[name], value), name
    with torch.no_grad():
        sampled, _ = samples_of(module, batch)
        log_probs = captioner(batch.images, sampled.tokens[..., :-1]).log_softmax(dim=-1)  # (B, n, T - 1, V)
    log_p = log_probs.gather(-1, sampled.tokens[..., 1:, None])[..., 0]
    valid = torch.arange(1, sampled.tokens.shape[-1]) < sampled.lengths[..., None]
    torch.testing.assert_close(log_p[valid], sampled.token_log_probs[..., 1:][valid], rtol=1e-4, atol=1e-4)


def test_every_part_has_a_gradient_in_mixed_precision(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, batch: CaptionBatch
) -> None:
    """Autocast keeps its bfloat16 copies of weights, and those that sampling made know of no gradient."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = build(captioner, tokenizer).training_step(batch, 0)
    loss.backward()
    assert loss.dtype == torch.float32
    for name, parameter in captioner.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_feature_maps_take_the_place_of_pictures(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, batch: CaptionBatch
) -> None:
    module = build(captioner, tokenizer)
    with torch.no_grad():
        maps = captioner.encoder(batch.images).to(torch.bfloat16)
    cached = CaptionBatch(maps, batch.tokens, batch.lengths, batch.image_ids)
    module.training_step(cached, 0).backward()
    assert captioner.bridge.project.weight.grad is not None
    assert captioner.encoder.backbone.conv_stem.weight.grad is None


def test_the_cross_entropy_of_the_pictures_own_captions_is_added(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, batch: CaptionBatch
) -> None:
    reward_alone = build(captioner, tokenizer).training_step(batch, 0)
    both = build(captioner, tokenizer, cross_entropy=0.25).training_step(batch, 0)
    own = batch_loss(captioner, batch, label_smoothing=0.0)
    assert torch.allclose(both, reward_alone + 0.25 * own, atol=1e-5)
    assert float(own.detach()) > 1


def test_learning_rates_are_scaled(captioner: CaptionModel, tokenizer: CaptionTokenizer) -> None:
    module = build(captioner, tokenizer, lr_scale=0.5)
    assert module.optimizer_settings["lr"] == {"encoder": 0.5, "bridge": 1.0, "decoder": 1.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"samples": 1},
            r"samples=1 must be a whole number of at least 2; training.baseline=greedy training.sampling=random does",
        ),
        (
            {"samples": 1, "baseline": "greedy", "sampling": "beam"},
            r"samples=1 must be a whole number of at least 2",
        ),
        ({"samples": 0, "baseline": "greedy"}, r"training.samples=0 must be a whole number of at least 1"),
        ({"samples": 2.5}, r"training.samples=2.5 must be a whole number"),
        ({"baseline": "mean"}, r"training.baseline=mean must be one of leave_one_out, greedy"),
        ({"sampling": "nucleus"}, r"training.sampling=nucleus must be one of beam, random"),
        (
            {"sampling": "beam", "temperature": 0.5},
            r"training.temperature=0.5 changes no beam; use 1, or training.sampling=random",
        ),
        ({"temperature": 0}, r"training.temperature=0 must be from 0.01 to 100"),
        ({"lr_scale": 0}, r"training.lr_scale=0 must be above 0; 1 keeps optimizer.lr"),
        ({"cross_entropy": -1}, r"training.cross_entropy=-1 must be at least 0; 0: the reward alone"),
        ({"objective": "xe"}, r"training.objective=xe must be one of cross_entropy, scst"),
        (
            {"label_smoothing": 0.1},
            r"training.label_smoothing=0.1 is no option of training=scst, which takes samples",
        ),
        ({"objective": "cross_entropy"}, r"training.samples=3 is no option of training=cross_entropy"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_objective(
            {"objective": "scst", "ema_decay": None, "max_bad_steps": 10, **SCST, **changes}, frozen=False
        )


@pytest.mark.parametrize(
    "training",
    [
        {
            "objective": "cross_entropy",
            "label_smoothing": 0.1,
            "token_dropout": 0.1,
            "start_size": None,
            "unfreeze_encoder_at": None,
        },
        {"objective": "scst", **{name: SCST[name] for name in SCST if name != "sampling"}},
    ],
    ids=["cross_entropy", "scst"],
)
def test_runs_from_before_a_setting_go_on_without_it(
    captioner: CaptionModel, tokenizer: CaptionTokenizer, training: dict[str, Any]
) -> None:
    training = {**training, "ema_decay": None}
    check_objective(training, frozen=False)
    cfg = {
        "training": training,
        "optimizer": {"lr": {"encoder": 1.0, "bridge": 1.0, "decoder": 1.0}},
        "seed": 0,
    }
    module = build_module(cfg, captioner, tokenizer, build_decoding(GREEDY), OfCaptions())
    assert module.hidden_captions == (0.0, 0.0)
    if isinstance(module, SelfCriticalModule):
        assert module.cross_entropy == 0.0
        assert isinstance(module.sampling, Nucleus)


def test_a_missing_setting_names_its_default() -> None:
    with pytest.raises(
        InputError, match=r"training.label_smoothing is missing; conf/training/cross_entropy.yaml"
    ):
        check_objective({"objective": "cross_entropy", "ema_decay": None, "max_bad_steps": 10}, frozen=False)
