"""Where the model looked: from tokens to words, drawn over pictures, and on the page."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from toys import GREEDY

from efficap.decoding import build_decoding
from efficap.evaluation.attention import Word, central_square, shade, shade_heads
from efficap.evaluation.gallery import GalleryItem, write_gallery
from efficap.models.bridge import Bridge
from efficap.models.build import build_model
from efficap.models.captioner import CaptionModel
from efficap.models.original import OriginalBridge
from efficap.tokenizer import CaptionTokenizer
from efficap.training.writer import CaptionWriter, words_of

TOKENIZER = CaptionTokenizer.learn(["a red picture", "all of it is green"] * 2, vocab_size=280)
RED = np.zeros((4, 4), np.float32)
RED[3, 0] = 1.0  # the lower left


@pytest.fixture
def captioner() -> CaptionModel:
    torch.manual_seed(3)
    model = build_model(tiny_model(bridge__n_blocks=2), TOKENIZER.vocab_size).eval()
    for parameter in (*model.bridge.parameters(), *model.decoder.parameters()):
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.4)
    return model


@pytest.mark.parametrize("kind", [Bridge, OriginalBridge])
@torch.no_grad()
def test_rollout_follows_attention_as_torchs_own_layer_has_it(kind: type[Bridge]) -> None:
    torch.manual_seed(0)
    bridge = kind(channels=32, grid=(2, 3), width=16, n_blocks=2, n_heads=4, dropout=0.0).eval()
    torch.nn.init.normal_(bridge.positions.weight)
    for block in bridge.blocks:
        torch.nn.init.normal_(block.qkv.weight)
    features = torch.randn(2, 32, 2, 3)
    x = bridge._embed(features)
    positions = x.shape[1]
    shares = torch.eye(positions).expand(2, -1, -1)
    for block in bridge.blocks:
        theirs = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        theirs.in_proj_weight, theirs.in_proj_bias = block.qkv.weight, block.qkv.bias
        normed = block.norm_1(x)
        _, weights = theirs(normed, normed, normed)  # the mean over heads
        shares = (0.5 * weights + 0.5 * torch.eye(positions)) @ shares
        x = block(x)
    if kind is OriginalBridge:
        shares = shares[:, 1:-1, 1:-1]
        shares = shares / shares.sum(-1, keepdim=True)
    rollout = bridge.rollout(features)
    assert rollout.shape == (2, 6, 6)
    torch.testing.assert_close(rollout, shares)
    assert (rollout - torch.eye(6)).abs().max() > 0.1, "blocks do mix positions here"


@torch.no_grad()
def test_rolled_out_cross_attention_still_sums_to_one_and_is_its_own_without_blocks() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(0, 50, (2, 1, 5))
    for blocks in (0, 2):
        model = build_model(tiny_model(bridge__n_blocks=blocks), 50).eval()
        plain, rolled = (model.cross_attention(images, tokens, rollout=rollout) for rollout in (False, True))
        torch.testing.assert_close(rolled.sum(-1), torch.ones(rolled.shape[:-1]))
        assert torch.equal(plain, rolled) == (blocks == 0)


def test_a_words_attention_is_the_mean_of_its_tokens_and_its_probability_their_product(
    captioner: CaptionModel,
) -> None:
    writer = CaptionWriter(captioner, TOKENIZER, build_decoding({**GREEDY, "batch_size": 2}))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for by_head in (False, True):
        written = writer.write(images, ["a", "b"], attention=True, by_head=by_head, rollout=True)
        for caption, *_ in written:
            words = words_of(caption, TOKENIZER)
            assert "".join(word.text for word in words) == caption.text
            for word, (_, places) in zip(words, TOKENIZER.words(caption.tokens[1:]), strict=True):
                rows = caption.attention[..., places, :]  # (…, tokens, N)
                expected = sum(rows[..., place, :] for place in range(len(places))) / len(places)
                flat = word.attention.reshape(*word.attention.shape[:-2], -1)
                np.testing.assert_allclose(flat, expected.numpy(), rtol=1e-5)
                assert word.attention.shape == ((2, 4, 2, 2) if by_head else (2, 2))
                product = math.prod(math.exp(caption.token_log_probs[place + 1]) for place in places)
                assert word.probability == pytest.approx(product)
            [first, *_] = words_of(replace(caption, attention=None), TOKENIZER)
            assert (first.text, first.probability, first.attention) == (
                words[0].text,
                words[0].probability,
                None,
            )


def test_what_the_model_sees_is_the_square_in_the_middle() -> None:
    assert central_square(200, 100, 0.8) == (60, 10, 140, 90)


def test_a_picture_stays_clear_where_the_model_looked_and_is_darkest_where_it_saw_nothing() -> None:
    over = shade(RED, (80, 40), crop=1.0)
    assert (over.mode, over.size) == ("LA", (80, 40))
    alpha = np.asarray(over)[..., 1]
    assert alpha[36, 24] == 0, "the lower left of the square in the middle"
    assert alpha[4, 56] == alpha[20, 5] == alpha.max() == round(255 * 0.8)
    even = np.asarray(shade(np.full((3, 3), 1 / 9, np.float32), (30, 30), crop=1.0))[..., 1]
    assert even.max() == 0, "who looks everywhere alike darkens nothing"


def test_each_head_has_its_own_map_of_the_picture() -> None:
    maps = np.full((2, 3, 4, 4), 1 / 16, np.float32)
    maps[1, 2] = RED
    mosaic = np.asarray(shade_heads(maps, Image.new("RGB", (64, 64), "white")), int)
    cell = (mosaic.shape[1] - 2) // 3
    assert mosaic.shape == (2 * cell + 1, 3 * cell + 2, 3)
    assert mosaic[:cell].min() == 255
    last = mosaic[cell + 1 :, 2 * cell + 2 :]
    assert last[-3, 3].min() == 255
    assert last[3, -3].max() < 80


def test_the_page_shows_each_words_map_over_its_picture_without_a_script(tmp_path: Path) -> None:
    words = [Word("a", 0.9, RED), Word(" <b>", 0.25, RED), Word(".", 1.0, RED)]
    picture = Image.new("RGB", (320, 160))
    write_gallery(tmp_path / "p.html", [GalleryItem(picture, "a <b>.", words=words)], title="t")
    html = (tmp_path / "p.html").read_text()
    assert html.count('<img class="look"') == 3
    assert "<script" not in html
    assert "default-src 'none'; img-src data:" in html
    assert (
        ' <span class="word" tabindex="0" title="probability 0.25" style="--doubt:0.75">&lt;b&gt;<img' in html
    )
    assert 'style="--doubt:0.00">.<img' in html, "no space before a mark"


def test_the_thinnest_picture_has_its_maps_too(tmp_path: Path) -> None:
    words = [Word("a", 1.0, np.tile(RED, (2, 4, 1, 1)))]
    for size in ((2000, 3), (1, 500), (1, 1)):
        item = GalleryItem(Image.new("RGB", size), "a", words=words, crop=0.9)
        write_gallery(tmp_path / "p.html", [item], title="t")
        assert (tmp_path / "p.html").read_text().count('class="heads"') == 1


def test_a_page_of_heads_has_them_beside_their_mean(tmp_path: Path) -> None:
    maps = np.tile(RED, (2, 4, 1, 1))
    items = [GalleryItem(Image.new("RGB", (64, 64)), "a", words=[Word("a", 1.0, maps)])]
    items.append(GalleryItem(tmp_path / "missing.jpg", "a", words=[Word("a", 1.0, maps)]))
    write_gallery(tmp_path / "p.html", items, title="t")
    html = (tmp_path / "p.html").read_text()
    assert html.count('class="look"') == html.count('<img class="heads"') == 1
    assert html.count('class="word"') == 2, "words are there without the picture too"
